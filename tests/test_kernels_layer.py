"""Layers in Triton train as torch's do: outputs and gradients, saved or computed anew, in fp32, fp16 and fp8.

Without a GPU Triton interprets its kernels.
"""

from __future__ import annotations

import contextlib
import tempfile
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kernels import interpreted
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.utils.checkpoint import checkpoint

from esm2_composer import model as module
from esm2_composer.attention import Attention, select_attention
from esm2_composer.fp8 import use_fp8
from esm2_composer.kernels.checks import relative_error
from esm2_composer.model import ESM2, ESM2Config

BATCHES = [5, 40], [33]  # lengths
CASES = ["fp32", "autocast", "half", "fp8", "checkpointed", "frozen"]


def make(config: ESM2Config, case: str, device: str = "cpu") -> ESM2:
    torch.manual_seed(0)
    net = ESM2(config)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    if case == "half":
        net = net.half()
    if case == "fp8":
        use_fp8(net)
    if case == "frozen":
        net.layers[0].requires_grad_(False)
        net.embed.requires_grad_(False)
    if case == "checkpointed":
        for layer in net.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return net.to(device)


def train(net: ESM2, case: str, device: str = "cpu") -> list[torch.Tensor]:
    """Logits of the last of two batches, and gradients, added up; of the last, every third token is predicted."""
    kind = torch.bfloat16 if device == "cuda" else torch.float16
    for lengths in BATCHES:
        tokens = torch.arange(sum(lengths), device=device) % 20 + 4
        cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(device)
        positions = None if lengths == BATCHES[0] else torch.arange(0, len(tokens), 3, device=device)
        with torch.autocast(device, kind) if case == "autocast" else contextlib.nullcontext():
            logits = net(tokens, cu_seqlens, max(lengths), positions)
        F.cross_entropy(logits.float(), tokens if positions is None else tokens[positions]).backward()
    return [logits.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]


def test_interpreted_a_model_on_it_trains_as_on_torchs() -> None:
    printed = interpreted("test_kernels_layer.print_errors()")
    errors = {case: float(error) for case, error in (line.split() for line in printed.splitlines())}
    assert errors.keys() == {*CASES}
    limits = {"autocast": 5e-3, "half": 5e-3, "fp8": 1e-3}  # in fp8, single numbers are rounded the other way
    assert all(error < limits.get(case, 1e-5) for case, error in errors.items()), errors


def print_errors() -> None:
    """The largest error of logits and gradients, of each case."""
    config, torchs = ESM2Config(2, 32, 2, 64), module.select_attention
    for case in CASES:
        torch_only = "fp32" if case in ("autocast", "half") else case
        module.select_attention = torchs
        want = train(make(config, torch_only), torch_only)
        module.select_attention = triton
        print(case, relative_error(train(make(config, case), case), want))


def triton(*_: object) -> Attention:
    from esm2_composer.kernels.layer import compute

    return Attention("triton", layer=compute)


def test_interpreted_it_infers_and_takes_gradients_that_are_one_number_in_all_places() -> None:
    assert float(interpreted("test_kernels_layer.print_other_errors()")) < 1e-5


def print_other_errors() -> None:
    tokens, cu_seqlens = torch.arange(40) % 20 + 4, torch.tensor([0, 7, 40], dtype=torch.int32)

    def results() -> list[torch.Tensor]:
        net = make(ESM2Config(2, 32, 2, 64), "fp32")
        with torch.inference_mode():
            inferred = net.represent(tokens, cu_seqlens, layer=1)
        net.represent(tokens, cu_seqlens, layer=1).sum().backward()
        return [inferred, *(p.grad for p in net.parameters() if p.grad is not None)]

    want = results()
    module.select_attention = triton
    print(relative_error(results(), want))
    x = torch.randn(40, 32, requires_grad=True)
    layer = make(ESM2Config(1, 32, 2, 64), "fp32").layers[0]
    out = (
        triton()
        .layer(layer, x, None, torch.zeros(2, 40, 1, 8, dtype=torch.int32), cu_seqlens, 33)[0]
        .square()
        .sum()
    )
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_interpreted_it_can_be_sharded_over_two_ranks() -> None:
    """Where a layer's weights are freed between its forward and its backward pass."""
    assert float(interpreted("test_kernels_layer.print_sharded_error()")) < 1e-5


def print_sharded_error() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(train_sharded, (folder,), 2, start_method="fork")


def train_sharded(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    config = ESM2Config(2, 32, 2, 64)
    plain, net = make(config, "fp32"), make(config, "fp32")
    train(plain, "fp32")
    module.select_attention = triton
    wrap = CustomPolicy(net.fsdp_wrap_fn)
    sharded = FullyShardedDataParallel(
        net, auto_wrap_policy=wrap, device_id=torch.device("cpu"), use_orig_params=True
    )
    train(sharded, "fp32")
    with FullyShardedDataParallel.summon_full_params(sharded, with_grads=True):
        pairs = zip(net.parameters(), plain.parameters(), strict=True)
        grads = [(ours.grad, theirs.grad) for ours, theirs in pairs if theirs.grad is not None]
    if not rank:
        print(relative_error(*zip(*grads, strict=True)))
    torch.distributed.barrier()


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["autocast", "checkpointed"])
@pytest.mark.parametrize("size", ["8m", "650m"])
def test_on_a_gpu_a_model_on_it_trains_as_on_torchs(size: str, case: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    c = module.SIZES[size]
    assert select_attention("auto", "cuda", torch.bfloat16, c.num_heads, c.head_size).name == "triton"
    dimensions = 2, c.hidden_size, c.num_heads, c.ffn_hidden_size
    want = train(make(ESM2Config(*dimensions, attention="cpu"), "fp32", "cuda"), "fp32", "cuda")
    net = make(ESM2Config(*dimensions), case, "cuda")
    got = train(net, "autocast", "cuda")
    together = [torch.cat([x.float().flatten() for x in each]) for each in (got, want)]
    assert relative_error([got[0], together[0]], [want[0], together[1]]) < 3e-2
