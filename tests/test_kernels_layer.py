"""Layers in Triton train as torch's do: outputs and gradients, saved or computed anew, in fp32, fp16 and fp8.

Without a GPU Triton interprets its kernels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from itertools import compress

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from kernels import SHARED_MEMORY, interpreted, launches, wide_loads
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.utils.flop_counter import FlopCounterMode

from esm2_composer import model as module
from esm2_composer.attention import Attention, select_attention
from esm2_composer.fp8 import use_fp8
from esm2_composer.kernels.checks import relative_error
from esm2_composer.model import ESM2, SIZES, ESM2Config
from esm2_composer.recipe.config import load_recipe
from esm2_composer.recipe.estimate import KEPT, KEPT_BF16

BATCHES = [3, 31], [7]  # lengths: more rows than the 32 of a program, and fewer
CASES = ["fp32", "autocast", "half", "fp8", "fp8, both recomputed", "frozen"]


def make(config: ESM2Config, case: str, device: str = "cpu") -> ESM2:
    torch.manual_seed(0)
    net = ESM2(config)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    if case == "half":
        net = net.half()
    if "fp8" in case:
        use_fp8(net)
    if case == "frozen":
        net.layers[0].requires_grad_(False)
        net.embed.requires_grad_(False)
    if case == "fp8, both recomputed":  # the last one differs, too
        net.layers[0].recomputes, net.layers[1].recomputes = True, "selective"
    elif case in ("selective", "recomputed"):
        net.recompute({"selective": "selective", "recomputed": True}[case])
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
    errors = {case: float(error) for case, error in (line.split(": ") for line in printed.splitlines())}
    assert errors.keys() == {*CASES}
    for case, error in errors.items():  # in fp8, single numbers are rounded the other way
        assert error < (5e-3 if case in ("autocast", "half") else 1e-3 if "fp8" in case else 1e-5), errors


def print_errors() -> None:
    """The largest error of logits and gradients, of each case."""
    config, torchs = ESM2Config(2, 32, 2, 64), module.select_attention
    for case in CASES:
        torch_only = "fp32" if case in ("autocast", "half") else case
        module.select_attention = torchs
        want = train(make(config, torch_only), torch_only)
        module.select_attention = triton
        print(f"{case}:", relative_error(train(make(config, case), case), want))


def triton(*_: object) -> Attention:
    from esm2_composer.kernels.layer import compute

    return Attention("triton", layer=compute)


MATRICES = {"_forward", "_backward_q", "_backward_kv"}
OTHERS = {"_rotate", "_add_norm", "_add_norm_backward", "_gelu", "_gelu_backward", "_sum_rows"}


@pytest.mark.parametrize(
    "size", ["8m", "650m", "15b", *(pytest.param(size, marks=pytest.mark.slow) for size in ("35m", "150m", "3b"))]
)
def test_what_a_step_launches_compiles_for_gpus_to_matrix_instructions_and_wide_loads(
    monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    """As the size's recipe trains it, for an A100 and an H100, neither of which this takes."""
    from esm2_composer.kernels import layer

    with torch.device("meta"):
        net = ESM2(dataclasses.replace(SIZES[size], num_layers=2))
    if load_recipe(f"{ROOT}/yamls/{size}.yaml", data_is_here=False).fsdp is None:
        monkeypatch.setattr(layer, "compute_dtype", lambda x: torch.bfloat16)  # autocast, which meta has not
    else:
        net = net.bfloat16()
    monkeypatch.setattr(module, "select_attention", triton)

    def step() -> None:
        tokens, cu_seqlens = torch.empty(300, dtype=torch.int32), torch.empty(9, dtype=torch.int32)
        x = net(tokens.to("meta"), cu_seqlens.to("meta"), 64, torch.empty(40, dtype=torch.int64, device="meta"))
        x.sum().backward()

    launched = launches(step)
    assert {launch.function.__name__ for launch in launched} == MATRICES | OTHERS
    for capability, instruction in ((80, "mma.sync"), (90, "wgmma")):
        for launch in launched:
            name, made = launch.function.__name__, launch.compile_for(capability)
            assert (instruction in made.asm["ptx"]) == (name in MATRICES), name
            assert "tf32" not in made.asm["ptx"], name
            assert wide_loads(made) or (size, name) == ("35m", "_forward"), name  # its heads are no power of two
            assert made.metadata.shared <= SHARED_MEMORY, name


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
    tables = torch.zeros(2, 40, 1, 8, dtype=torch.int32)
    out = triton().layer(layer, x, None, tables, cu_seqlens, 33)[0].square().sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize(("case", "by_plan"), [("half", KEPT_BF16), ("autocast", KEPT)])
def test_interpreted_recomputing_changes_no_bit_and_keeps_and_repeats_what_the_plan_says(
    case: str, by_plan: dict
) -> None:
    printed = interpreted(f"test_kernels_layer.print_recomputed('{case}')").splitlines()
    kept, operations = zip(*(map(float, line.split()) for line in printed), strict=True)
    statistics = 0.5  # of the norms' rows and attention's heads, by the plan
    assert kept == (by_plan[False] - statistics, by_plan["selective"] - statistics, by_plan[True])
    forward, last = 12, 4  # products of 32 x 32 a token, where the feed-forward has 4 times as many columns
    assert operations == (1, 1, (3 * forward + forward - last) / (3 * forward))


def print_recomputed(case: str) -> None:
    """What is kept, and how many times as many operations the products take; the gradients are the same."""
    cu_seqlens, tables = torch.tensor([0, 3, 7], dtype=torch.int32), torch.zeros(2, 7, 1, 8, dtype=torch.int32)
    layer = make(ESM2Config(1, 32, 2, 128), case).layers[0]
    x = torch.randn(7, 32, dtype=torch.half if case == "half" else torch.float, requires_grad=True)
    inputs = [x, torch.randn(7, 32, dtype=torch.half, requires_grad=True)]

    def step(recomputes: bool | str) -> tuple[int, int, tuple]:
        layer.recomputes, kept = recomputes, {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if len(tensor) == 7 and tensor.ndim > 1:  # of tokens, and no statistics
                kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with FlopCounterMode(display=False) as counter:
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            with hooks, torch.autocast("cpu", torch.half, enabled=case == "autocast"):
                out = triton().layer(layer, *inputs, tables, cu_seqlens, 4)
            grads = torch.autograd.grad(out, [*inputs, *layer.parameters()], [*map(torch.ones_like, out)])
        return sum(kept.values()), counter.get_total_flops(), grads

    _, fewest, once = step(False)
    for recomputes in (False, "selective", True):
        kept, operations, grads = step(recomputes)
        assert all(map(torch.equal, grads, once))
        print(kept / 7 / 32, operations / fewest)


SLOW = (1, "fp32"), (1, "selective"), (2, "selective"), (2, "recomputed")


@pytest.mark.parametrize(
    ("version", "case"), [(1, "recomputed"), *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]
)
def test_interpreted_it_can_be_sharded_over_two_ranks(version: int, case: str) -> None:
    """Where a layer's weights are freed between its forward and its backward pass."""
    assert float(interpreted(f"test_kernels_layer.print_sharded_error({version}, '{case}')")) < 1e-5


def print_sharded_error(version: int, case: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(train_sharded, (folder, version, case), 2, start_method="fork")


def train_sharded(rank: int, folder: str, version: int, case: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    config = ESM2Config(4, 32, 2, 64)  # two groups of layers
    plain, net = make(config, "fp32"), make(config, case)
    train(plain, "fp32")
    trained = [p.grad is not None for p in plain.parameters()]
    module.select_attention = triton
    if version == 1:
        sharded = FullyShardedDataParallel(
            net,
            auto_wrap_policy=CustomPolicy(net.fsdp_wrap_fn),
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )
        train(sharded, case)
        with FullyShardedDataParallel.summon_full_params(sharded, with_grads=True):
            grads = [p.grad.clone() for p in compress(net.parameters(), trained)]
    else:
        from esm2_composer.distributed.fsdp import means_are_sums  # which takes seconds to import

        for part in (*net.groups, net):
            fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
        train(net, case)
        parts = 2 if means_are_sums() else 1
        grads = [p.grad.full_tensor() / parts for p in compress(net.parameters(), trained)]
    if not rank:
        print(relative_error(grads, [p.grad for p in compress(plain.parameters(), trained)]))
    torch.distributed.barrier()


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["autocast", "selective", "recomputed"])
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
