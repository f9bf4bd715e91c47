"""It trains like ESM-2: `composer train.py` takes the steps of transformers' model under plain PyTorch.

The reference is written down here anew, from the published recipe: EsmForMaskedLM on padded batches, AdamW with
its groups, warmup and decay, clipping. It shares with the package the initial weights and what the loader gives.
"""

import pytest
import torch
from conftest import ROOT, composer
from outcomes import read_scalars
from plot_convergence import PERPLEXITY, read_run
from torch.nn.utils.rnn import pad_sequence
from transformers import EsmConfig, EsmForMaskedLM

from esm2_composer import alphabet
from esm2_composer.data.draw import ClusterDraw
from esm2_composer.data.loaders import train_loader
from esm2_composer.data.masking import MaskingRule
from esm2_composer.model import ESM2Config
from esm2_composer.weights.hugging_face import hugging_face_config

# At a peak of 3e-3 rounding alone moves the reference's losses by 2e-4 (fp32 beside fp64); at 1e-3 by 2e-7.
UPDATES, WARMUP, PEAK, BATCH, SEED, MAX_LENGTH = 100, 10, 1e-3, 16, 17, 256


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of weights as transformers initialises them."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    EsmForMaskedLM(EsmConfig(**hugging_face_config(ESM2Config(3, 96, 4, 384)))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(shards, weights) -> list[float]:
    """The loss of every update of the reference."""
    model = EsmForMaskedLM.from_pretrained(weights).train()
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        (kept if "LayerNorm" in name or "layer_norm" in name or "bias" in name else decayed).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": kept, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        eps=1e-8,
    )
    losses: list[float] = []
    for inputs, labels in padded_batches(shards):
        update = len(losses) + 1
        # linear from 0, then to a tenth over 90 % of the rest, then constant
        progress = (update - WARMUP) / (0.9 * (UPDATES - WARMUP))
        rate = PEAK * (update / WARMUP if update < WARMUP else max(0.1, 1 - 0.9 * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(inputs, attention_mask=(inputs != alphabet.PAD).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def padded_batches(shards):
    """What the loader gives in `UPDATES` updates: inputs and labels, int64 (16, longest), for transformers."""
    draw = ClusterDraw(SEED, MAX_LENGTH, 1, MaskingRule())
    loader = train_loader(draw, None, f"{shards}/train", BATCH, num_workers=0)
    batches: list = []
    while len(batches) < UPDATES:
        for batch in loader:
            lengths = batch["lengths"].tolist()
            assert len(lengths) == BATCH
            rows = ([row.long() for row in batch[key].split(lengths)] for key in ("tokens", "labels"))
            inputs, labels = (pad_sequence(each, batch_first=True, padding_value=alphabet.PAD) for each in rows)
            batches.append((inputs, labels.masked_fill(labels == alphabet.PAD, -100)))
    return batches[:UPDATES]


@pytest.mark.slow
def test_training_takes_the_steps_of_transformers_under_plain_pytorch(shards, weights, expected, tmp_path):
    result = composer(
        *(ROOT / "train.py", ROOT / "yamls/demo.yaml", f"data.remote={shards}"),
        *(f"model.{name}=null" for name in ("num_layers", "hidden_size", "num_heads", "ffn_hidden_size")),
        *(f"model.init_from={weights}", f"data.max_length={MAX_LENGTH}", f"seed={SEED}"),
        *(f"global_train_batch_size={BATCH}", "device_microbatch_tokens=1024"),
        *(f"max_duration={UPDATES}ba", f"schedule.warmup={WARMUP}", f"optimizer.lr={PEAK}"),
        *(f"eval_interval={UPDATES}ba", f"save_interval={UPDATES}ba"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    losses = read_scalars(tmp_path / "runs/demo", "loss/train/total")
    assert sorted(losses) == list(range(UPDATES))
    differences = [abs(losses[i] - loss) / loss for i, loss in enumerate(expected)]
    print(f"loss {expected[0]:.4f} to {expected[-1]:.4f}, at most {max(differences):.1e} apart")  # for -s
    assert expected[-1] < expected[0] - 0.5
    assert max(differences) < 1e-4
    run = read_run(tmp_path / "runs/demo")
    assert run.settings["data.replacement"] == "amino_acids"
    assert run.curve == read_scalars(tmp_path / "runs/demo", PERPLEXITY)
