"""Who takes part in `benchmark.py step`, and how each of them makes a training step.

All get the same random sequences under the same masks, clip the gradient's norm and step AdamW with the recipe's
settings; on a GPU all compute under bf16 autocast on fp32 weights. This project trains through Composer's Trainer,
with all that its runs do in a step; the others in the shortest correct loop: microbatches of at most a given
number of slots, padding counted, each weighted by its masked tokens, and the loss read once per step, as the
Trainer does.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset

from esm2_composer.alphabet import AMINO_ACIDS, CLS, EOS, PAD
from esm2_composer.attention import select_attention
from esm2_composer.data.masking import MaskingRule
from esm2_composer.kernels.checks import failure_line
from esm2_composer.model import ESM2, SIZES
from esm2_composer.optim import build_adamw
from esm2_composer.recipe.config import load_recipe
from esm2_composer.recipe.schema import Recipe
from esm2_composer.weights.hugging_face import hugging_face_config

LONGEST = 1024  # tokens of a sequence
YAMLS = Path(__file__).parents[2] / "yamls"


@dataclass(frozen=True)
class Work:
    """What to train on, and for how long."""

    size: str
    device: str  # cpu or cuda
    batches: list[list[int]]  # tokens of each sequence
    microbatch_tokens: int  # slots computed at a time
    warmup: int  # steps before the first that counts
    steps: int


@dataclass(frozen=True)
class Outcome:
    seconds: list[float]  # of each step that counts; step i is on batch (warmup + i) % len(batches)
    peak_bytes: int  # on a GPU what was allocated at most, on a CPU by how much the process grew at most
    attention: str  # as the contender calls it


@dataclass(frozen=True)
class Failure:
    """Why a contender has no figures."""

    reason: str
    out_of_memory: bool = False  # the GPU's: half a microbatch may do


def contenders(device: str, size: str) -> dict[str, Callable[[Work], Outcome]]:
    """Those that can run here: ours first, and last those that take minutes to compile."""
    on_gpu = device == "cuda"
    found = {"esm2_composer": ours}
    if not on_gpu:  # on a GPU whole layers are in Triton, and nothing is left to compile
        found["esm2_composer, compiled"] = partial(ours, compiled=True)
    if on_gpu and recipe_of(size, sharded=True).fsdp is not None:
        found["esm2_composer, FSDP"] = partial(ours, sharded=True)
    if on_gpu:
        found["esm2_composer, fp8"] = partial(ours, fp8=True)
        found["esm2_composer, torch's attention, compiled"] = partial(ours, compiled=True, attention="torch")
    if on_gpu and importlib.util.find_spec("flash_attn"):
        found["esm2_composer, flash-attn, compiled"] = partial(ours, compiled=True, attention="flash")
        found["transformers, flash-attn"] = partial(padded, attention="flash_attention_2")
    if importlib.util.find_spec("faesm"):
        found["faesm, padded to longest"] = partial(padded, make=faesm)
    if on_gpu and importlib.util.find_spec("esme"):
        found["esm-efficient, no padding"] = esm_efficient
    peers: dict[str, str | None] = {"transformers": None}  # as it comes
    if not knows_sdpa():  # a fair comparison takes what newer ones have
        peers["transformers, sdpa patched in"] = "sdpa"
    for compiled in (False, True) if on_gpu else (False,):
        end = ", compiled" if compiled else ""
        for model, chosen in peers.items():
            plain = partial(padded, compiled=compiled, attention=chosen)
            found |= {f"{model}, padded to 1024{end}": partial(plain, width=LONGEST)}
            found |= {f"{model}, padded to longest{end}": plain}
    return found


def run_contender(name: str, work: Work) -> Outcome | Failure:
    """Its outcome, whatever that is: peers fail in their own ways."""
    torch.manual_seed(0)
    try:
        return contenders(work.device, work.size)[name](work)
    except torch.OutOfMemoryError:
        return Failure(f"out of memory at {work.microbatch_tokens:,} tokens a microbatch", out_of_memory=True)
    except Exception as error:
        traceback.print_exc()
        return Failure(failure_line(error))


# This project


class Batches(IterableDataset):
    """The batches over and over, as the loader's shares of a global batch."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._shares = [share_of(lengths) for lengths in work.batches]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for step in range(self._work.warmup + self._work.steps):
            yield self._shares[step % len(self._shares)]


def recipe_of(size: str, sharded: bool = False) -> Recipe:
    """The recipe of a size, on one device; `sharded` as the recipe has it."""
    return load_recipe(str(YAMLS / f"{size}.yaml"), [] if sharded else ["fsdp=null"], data_is_here=False)


def make_trainer(
    work: Work,
    compiled: bool = False,
    attention: str = "auto",
    fp8: bool = False,
    sharded: bool = False,
    callbacks: tuple = (),
    loggers: list | None = None,
) -> Any:
    """Composer's Trainer, with all that runs do in a step, including TensorBoard unless other loggers are
    given."""
    from composer import Trainer

    from esm2_composer.data.pool import data_spec
    from esm2_composer.distributed.fsdp import parallelism_of
    from esm2_composer.fp8 import use_fp8
    from esm2_composer.loggers import build_loggers
    from esm2_composer.optim import build_adamw, build_schedule
    from esm2_composer.runner import build_callbacks
    from esm2_composer.task import MaskedLanguageModel

    on_gpu = work.device == "cuda"
    events = tempfile.TemporaryDirectory()
    recipe = dataclasses.replace(
        recipe_of(work.size, sharded),
        device_microbatch_tokens=work.microbatch_tokens,
        tensorboard_folder=events.name,
    )
    with torch.device(work.device):  # a GPU draws billions of weights in no time
        net = ESM2(dataclasses.replace(SIZES[work.size], attention=attention))
    if fp8:
        use_fp8(net)
    if compiled:
        net.compile_layers()
    model = MaskedLanguageModel(net)
    o = recipe.optimizer
    optimizer = build_adamw(net, o.lr, o.betas, o.eps, o.weight_decay)
    loader = DataLoader(Batches(work), batch_size=1, collate_fn=lambda shares: shares[0])
    trainer = Trainer(
        model=model,
        optimizers=optimizer,
        schedulers=build_schedule(optimizer, **dataclasses.asdict(recipe.schedule)),
        step_schedulers_every_batch=True,
        train_dataloader=data_spec(loader, work.microbatch_tokens, net.config.hidden_size),
        accumulate_train_batch_on_tokens=True,
        max_duration=f"{work.warmup + work.steps}ba",
        device="gpu" if on_gpu else "cpu",
        precision="amp_bf16" if on_gpu else "fp32",
        parallelism_config=parallelism_of(recipe.fsdp, on_gpu),
        callbacks=[*build_callbacks(recipe, model, on_gpu), *callbacks],
        loggers=build_loggers(recipe) if loggers is None else loggers,
        progress_bar=False,
        seed=0,
    )
    trainer.events = events  # a folder that is deleted with it
    return trainer


def ours(
    work: Work, compiled: bool = False, attention: str = "auto", fp8: bool = False, sharded: bool = False
) -> Outcome:
    from composer.core import Callback

    ends: list[float] = []

    class Clock(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            ends.append(time.perf_counter())

    trainer = make_trainer(work, compiled, attention, fp8, sharded, (Clock(),))
    before = resident_bytes()
    trainer.fit()
    trainer.close()
    computed, c = (torch.bfloat16 if work.device == "cuda" else torch.float32), SIZES[work.size]
    used = select_attention(attention, work.device, computed, c.num_heads, c.head_size)
    return outcome(ends, before, work, used.name)


# Peers


def knows_sdpa() -> bool:
    """Whether the installed transformers has sdpa for ESM, which is then its default; 4.53 has not."""
    from transformers import EsmForMaskedLM

    return EsmForMaskedLM._supports_sdpa


def transformers_esm(size: str, attention: str | None) -> tuple[torch.nn.Module, str]:
    """The model, on the attention named or on transformers' own choice, and the attention's name."""
    from transformers import EsmConfig, EsmForMaskedLM

    patch = attention == "sdpa" and not knows_sdpa()
    chosen = {} if attention is None or patch else {"attn_implementation": attention}
    model = EsmForMaskedLM(EsmConfig(**hugging_face_config(SIZES[size]), **chosen))
    if patch:
        patch_sdpa_in(model)
    return model, attention or model.config._attn_implementation


def patch_sdpa_in(model: torch.nn.Module) -> None:
    """Replace the attention of a transformers that has only plain products by torch's function."""
    from transformers.models.esm.modeling_esm import EsmSelfAttention

    class SdpaSelfAttention(EsmSelfAttention):
        def forward(self, hidden_states, attention_mask=None, *_, **__):
            projections = (self.query, self.key, self.value)
            q, k, v = (self.transpose_for_scores(project(hidden_states)) for project in projections)
            q, k = self.rotary_embeddings(q * self.attention_head_size**-0.5, k)
            mixed = F.scaled_dot_product_attention(q, k, v, attention_mask, scale=1.0)
            return (mixed.transpose(1, 2).flatten(2),)

    for layer in model.esm.encoder.layer:
        layer.attention.self.__class__ = SdpaSelfAttention


def faesm(size: str, _: str | None) -> tuple[torch.nn.Module, str]:
    """On flash-attn if that is installed, else on torch's sdpa."""
    from faesm.esm import FAEsmForMaskedLM, flash_attn_installed

    with tempfile.TemporaryDirectory() as folder:  # it needs a tokenizer next to the weights
        ESM2(SIZES[size]).save_hf(folder)
        model = FAEsmForMaskedLM.from_pretrained(folder, flash_attn_installed, 0.0)
    return model, "flash-attn" if flash_attn_installed else "sdpa"


def padded(
    work: Work,
    width: int | None = None,
    compiled: bool = False,
    attention: str | None = None,
    make: Callable[[str, str | None], tuple[torch.nn.Module, str]] = transformers_esm,
) -> Outcome:
    """On batches padded to `width` tokens, or to the longest of a microbatch."""
    with torch.device(work.device):
        model, used = make(work.size, attention)
    if compiled:  # one graph for all layers, as ours: the whole of 33 at once takes many minutes
        # At a fixed width there is one for each number of sequences; beyond torch's limit it would not compile.
        torch._dynamo.config.recompile_limit = 64
        for layer in model.esm.encoder.layer:
            layer.compile(dynamic=width is None)
    batches = [padded_microbatches(lengths, width, work.microbatch_tokens) for lengths in work.batches]

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        return model(input_ids=inputs, attention_mask=(inputs != PAD).long())["logits"]

    return train_plainly(work, model, logits, batches, used)


def esm_efficient(work: Work) -> Outcome:
    """On batches without padding, as ours; where flash-attn is not installed, on the kernel of it in torch."""
    used = "flash-attn" if importlib.util.find_spec("flash_attn") else stand_in_for_flash_attn(work)
    from esme import ESM2 as EsmEfficient

    c = SIZES[work.size]
    with torch.device(work.device):
        model = EsmEfficient(c.num_layers, c.hidden_size, c.num_heads, dtype=torch.float32)
    batches = [flat_microbatches(lengths, work.microbatch_tokens) for lengths in work.batches]

    def logits(tokens: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        return model(tokens, pad_args=(cu_seqlens, LONGEST))

    return train_plainly(work, model, logits, batches, used)


def stand_in_for_flash_attn(work: Work) -> str:
    """Let `import flash_attn` find torch's kernel. Returns its name."""
    c, dtype = SIZES[work.size], torch.bfloat16 if work.device == "cuda" else torch.float32
    chosen = "torch" if work.device == "cuda" else "cpu"
    attention = select_attention(chosen, work.device, dtype, c.num_heads, c.head_size)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, max_seqlen_q, **_):
        return attention.kernel(q, k, v, cu_seqlens_q, max_seqlen_q)

    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.flash_attn_varlen_func = flash_attn_varlen_func
    padding.pad_input = padding.unpad_input = None  # nothing is padded
    for module in (package, padding):
        module.__spec__ = ModuleSpec(module.__name__, None)  # others check whether there is one
        sys.modules[module.__name__] = module
    return attention.name


def train_plainly(
    work: Work,
    model: torch.nn.Module,
    logits: Callable[..., torch.Tensor],
    batches: list[list[tuple[torch.Tensor, ...]]],
    attention: str,
) -> Outcome:
    """A training loop in plain PyTorch on microbatches (*inputs, labels); `logits` makes those of all places."""
    o = recipe_of(work.size).optimizer
    model = model.to(work.device).train()
    optimizer = build_adamw(model, o.lr, o.betas, o.eps, o.weight_decay)
    counts = [sum(int((labels != PAD).sum()) for *_, labels in microbatches) for microbatches in batches]
    ends: list[float] = []
    before = resident_bytes()
    for step in range(work.warmup + work.steps):
        microbatches, masked = batches[step % len(batches)], counts[step % len(batches)]
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=work.device)
        for microbatch in microbatches:
            *inputs, labels = (x.to(work.device, non_blocking=True) for x in microbatch)
            with torch.autocast(work.device, torch.bfloat16, enabled=work.device == "cuda"):
                found = logits(*inputs).flatten(0, -2)
            labels = labels.flatten()
            loss = F.cross_entropy(found.float(), labels, ignore_index=PAD, reduction="sum") / masked
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
        optimizer.step()
        assert total.isfinite()
        ends.append(time.perf_counter())
    return outcome(ends, before, work, attention)


def flat_microbatches(lengths: list[int], slots: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(tokens int64 (T,), cu_seqlens int32 (B+1,), labels int64 (T,)) of as many sequences in their order as
    `slots` hold."""
    share = share_of(lengths)
    tokens, labels = (share[key].long().split(lengths) for key in ("tokens", "labels"))
    bins: list[list[int]] = [[]]
    for i, length in enumerate(lengths):
        if sum(lengths[j] for j in bins[-1]) + length > slots:
            bins.append([])
        bins[-1].append(i)
    return [
        (
            torch.cat([tokens[i] for i in bin_]),
            torch.tensor([0, *(lengths[i] for i in bin_)]).cumsum(0).int(),
            torch.cat([labels[i] for i in bin_]),
        )
        for bin_ in bins
    ]


def padded_microbatches(
    lengths: list[int], width: int | None, slots: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs, labels), int64 (B, width), of as many sequences in their order as `slots` hold."""
    share = share_of(lengths)
    rows = [share[key].long().split(lengths) for key in ("tokens", "labels")]

    def padded_rows(row: tuple[torch.Tensor, ...], bin_: list[int]) -> torch.Tensor:
        target = width or max(lengths[i] for i in bin_)
        return torch.stack([F.pad(row[i], (0, target - lengths[i]), value=PAD) for i in bin_])

    return [tuple(padded_rows(row, bin_) for row in rows) for bin_ in bins_of(lengths, width, slots)]


def bins_of(lengths: list[int], width: int | None, slots: int) -> list[list[int]]:
    """The sequences of each padded microbatch, in their order."""
    bins: list[list[int]] = [[]]
    for i in range(len(lengths)):
        bin_ = [*bins[-1], i]
        if len(bin_) * (width or max(lengths[j] for j in bin_)) <= slots or not bins[-1]:
            bins[-1] = bin_
        else:
            bins.append([i])
    return bins


# What all share


def share_of(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Random residues under the recipes' mask: tokens and labels uint8 (T,), lengths int32 (B,)."""
    generator = np.random.default_rng(1)
    parts = []
    for length in lengths:
        tokens = generator.choice(AMINO_ACIDS, length)
        tokens[0], tokens[-1] = CLS, EOS
        parts.append(MaskingRule().apply(tokens, generator.random(length)))
    tokens, labels = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    return {"tokens": tokens, "labels": labels, "lengths": torch.tensor(lengths, dtype=torch.int32)}


def outcome(ends: list[float], before: int, work: Work, attention: str) -> Outcome:
    """From the times at which steps ended, and the process's memory before the first."""
    if work.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    counted = ends[work.warmup - 1 :]
    return Outcome([stop - start for start, stop in itertools.pairwise(counted)], peak, attention)


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss
