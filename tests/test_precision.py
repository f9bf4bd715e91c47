"""Training in bf16, compiled, and in fp8 loses what training in fp32 loses, from the same weights and batches."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from composer.core import Precision
from composer.distributed.fsdp2 import create_mixed_precision_policy
from composer.distributed.mosaic_parallelism import get_mixed_precision
from test_fp8 import plain_and_compiled
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy

from esm2_composer.alphabet import AMINO_ACIDS, CLS, EOS
from esm2_composer.callbacks import GradientRelease
from esm2_composer.data.masking import MaskingRule
from esm2_composer.data.pool import Microbatch, pack
from esm2_composer.fp8 import use_fp8
from esm2_composer.model import ESM2, ESM2Config
from esm2_composer.optim import build_adamw, build_schedule

SMALL = ESM2Config(2, 64, 4, 256)


@pytest.fixture(autouse=True)
def one_thread():
    """Products are so small that threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batches(steps: int, sequences: int) -> list[Microbatch]:
    """Mutants of four proteins, masked: something that can be learnt."""
    rng = np.random.default_rng(0)
    families = [rng.choice(AMINO_ACIDS, length) for length in (31, 47, 62, 90)]
    made = []
    for _ in range(steps):
        inputs, labels, lengths = [], [], []
        for _ in range(sequences):
            residues = families[rng.integers(4)].copy()
            mutated = rng.random(len(residues)) < 0.1
            residues[mutated] = rng.choice(AMINO_ACIDS, mutated.sum())
            tokens = np.concatenate(([CLS], residues, [EOS])).astype(np.uint8)
            shown, hidden = MaskingRule().apply(tokens, rng.random(len(tokens)))
            inputs.append(shown)
            labels.append(hidden)
            lengths.append(len(tokens))
        made.append(pack(np.concatenate(inputs), np.concatenate(labels), np.array(lengths, np.int32)))
    return made


def train(
    config: ESM2Config,
    made: list[Microbatch],
    device: str,
    bf16: bool = True,
    fp8: bool = False,
    fsdp: int | None = None,
    rate: float = 1e-3,
    **compile_options,
) -> np.ndarray:
    """The loss of every step: as in training, but for Composer."""
    torch.manual_seed(0)
    net = ESM2(config)
    if fp8:
        use_fp8(net)
    if compile_options:
        net.compile_layers(**compile_options)
    net.to(device)
    if fsdp:
        net = shard(net, fsdp, "DEFAULT")
    optimizer = build_adamw(net, rate, (0.9, 0.98), 1e-8, 0.01)
    schedule = build_schedule(optimizer, warmup=10, updates=1000, decay_fraction=1.0, floor=1.0)
    losses = []
    for batch in made:
        tokens, cu_seqlens, positions, targets = (
            batch[key].to(device) for key in ("tokens", "cu_seqlens", "positions", "targets")
        )
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            logits = net(tokens, cu_seqlens, batch["max_seqlen"], positions)
        loss = F.cross_entropy(logits.float(), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return np.array(losses)


def shard(net: ESM2, version: int, mixed_precision: str) -> torch.nn.Module:
    """As Composer does with this version of FSDP."""
    if version == 1:
        return FullyShardedDataParallel(
            net,
            auto_wrap_policy=CustomPolicy(net.fsdp_wrap_fn),
            mixed_precision=get_mixed_precision(Precision.AMP_BF16, mixed_precision)[0],
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )
    policy = create_mixed_precision_policy(Precision.AMP_BF16, mixed_precision)
    for module in (*net.groups, net):
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    return net


@pytest.fixture(scope="module")
def made() -> list[Microbatch]:
    return batches(60, sequences=12)


@pytest.fixture(scope="module")
def exact(made: list[Microbatch]) -> np.ndarray:
    """The losses of fp32."""
    return train(SMALL, made, "cpu", bf16=False)


def check(losses: np.ndarray, exact: np.ndarray, one: float, mean: float) -> None:
    """No loss is off by more than the share `one` of it, and those of the last half not by `mean` on average."""
    assert exact[-5:].mean() < 0.9 * exact[:5].mean(), "something is learnt"
    apart = losses / exact - 1
    half = len(exact) // 2
    print(f"{exact[0]:.3f} to {exact[-1]:.3f}: {abs(apart).max():.1e}, {apart[half:].mean():+.1e}")  # for -s
    assert 0 < abs(apart).max() <= one
    assert abs(apart[half:].mean()) <= mean


def test_the_loss_of_compiled_bf16_follows_fp32(made: list[Microbatch], exact: np.ndarray) -> None:
    torch._dynamo.reset()
    check(train(SMALL, made, "cpu", backend="aot_eager"), exact, 2e-3, 5e-4)


@pytest.mark.parametrize("version", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_loss_of_bf16_under_fsdp_follows_fp32(version: int, made, exact, one_rank) -> None:
    check(train(SMALL, made, "cpu", fsdp=version), exact, 2e-3, 5e-4)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("fsdp", "stream"), [(None, torch.float32), ("FULL", torch.float32), ("DEFAULT", torch.bfloat16)]
)
def test_the_residual_stream_is_bf16_only_where_fsdp_casts_the_embedding(
    fsdp: str | None, stream: torch.dtype, version: int, one_rank
) -> None:
    """Autocast leaves the embedding in fp32, and sums with it."""
    (batch,) = batches(1, sequences=3)
    net, seen = ESM2(SMALL), set()
    for layer in net.layers:
        layer.register_forward_hook(lambda _, given, made: seen.update((given[0].dtype, made[0].dtype)))
    if fsdp:
        net = shard(net, version, fsdp)
    with torch.autocast("cpu", torch.bfloat16):
        net(batch["tokens"], batch["cu_seqlens"], batch["max_seqlen"])
    assert seen == {stream}


def test_the_loss_in_fp8_follows_fp32(made: list[Microbatch], exact: np.ndarray) -> None:
    """Emulated: rounded as fp8 is, and multiplied in fp32."""
    check(train(SMALL, made, "cpu", fp8=True), exact, 2e-2, 2e-3)


@pytest.mark.parametrize("version", [1, 2])
def test_compiled_and_sharded_layers_can_be_evaluated_first_after_an_update(version: int, one_rank) -> None:
    """As in a run that was resumed. Version 1 needs the gradients to be gone."""
    (batch,) = batches(1, sequences=3)
    torch._dynamo.reset()
    net = ESM2(SMALL)
    net.compile_layers(backend="eager")
    net = shard(net, version, "DEFAULT")
    optimizer = torch.optim.AdamW(net.parameters())
    inputs = batch["tokens"], batch["cu_seqlens"], batch["max_seqlen"], batch["positions"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(net(*inputs).float(), batch["targets"])
        loss.backward()
        optimizer.step()
        GradientRelease().eval_start(SimpleNamespace(optimizers=(optimizer,)), None)
        with torch.no_grad():
            assert F.cross_entropy(net.eval()(*inputs).float(), batch["targets"]) < loss


@pytest.mark.slow
def test_the_loss_of_200_steps_in_machine_code_follows_fp32() -> None:
    made = batches(200, sequences=12)
    torch._dynamo.reset()
    check(train(SMALL, made, "cpu", backend="inductor"), train(SMALL, made, "cpu", bf16=False), 1e-2, 2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("fp8", "attention"), [(False, "auto"), (True, "auto"), (False, "torch")])
def test_on_a_gpu_the_loss_of_200_steps_follows_fp32(fp8: bool, attention: str) -> None:
    """Layers in Triton, or compiled around torch's attention."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if fp8 and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no fp8 here")
    made, config = batches(200, sequences=50), ESM2Config(6, 320, 20, 1280, attention)
    # At 1e-3 the mutants are soon known by heart, and then a small step to the side is a large share of the loss.
    exact = train(replace(config, attention="cpu"), made, "cuda", bf16=False, rate=1e-4)
    ours = train(config, made, "cuda", fp8=fp8, rate=1e-4, backend="inductor")
    # fp8's on an H200 was at most 0.049 off, and 0.010 on average: it learns by heart a little later.
    check(ours, exact, *((0.06, 0.012) if fp8 else (0.02, 0.005)))


@pytest.mark.parametrize("version", [1, 2])
def test_fp8_and_compiled_layers_can_be_sharded(version: int, one_rank) -> None:
    (batch,) = batches(1, sequences=3)

    def loss(net: ESM2) -> torch.Tensor:
        logits = net(batch["tokens"], batch["cu_seqlens"], batch["max_seqlen"], batch["positions"])
        return F.cross_entropy(logits, batch["targets"])

    plain, compiled = plain_and_compiled(SMALL)
    nets = plain, shard(compiled, version, "FULL")
    losses = [loss(net) for net in nets]
    for each in losses:
        each.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        if p.grad is not None:
            grad = q.grad if version == 1 else q.grad.full_tensor()
            assert (p.grad - grad).norm() <= 1e-4 * p.grad.norm(), name
