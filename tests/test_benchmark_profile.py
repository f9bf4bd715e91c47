"""benchmark.py profile: a step's time is accounted for, and a step waits where Composer's own does."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import composer.algorithms
import pytest
import torch
from benchmarks import profile
from benchmarks.contenders import Work, make_trainer
from composer import Trainer
from composer.callbacks import LRMonitor, MemoryMonitor, SpeedMonitor
from composer.models import ComposerModel
from test_benchmark_step import CPU, H200, TINY, arguments
from torch.autograd.profiler_util import FunctionEvent
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from esm2_composer.attention import Attention
from esm2_composer.errors import UserError
from esm2_composer.model import SIZES
from esm2_composer.recipe.architecture import skeleton


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, cutlass::bfloat16_t>>", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k64_sm80", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("mkl::_mkl_linear", "matrix products"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimizer"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::_foreach_norm", "optimizer"),
        ("triton_per_fused__to_copy_add_native_layer_norm_0", profile.OTHER),
        ("aten::gelu_backward", profile.OTHER),
        ("Memcpy HtoD (Pinned -> Device)", profile.OTHER),
        ("_rotate", "attention"),
        ("_backward_kv", "attention"),
        ("triton_poi_fused_gelu_gelu_backward_4", profile.OTHER),
    ],
)
def test_kernels_and_operators_belong_to_parts(kernel, part):
    assert profile.part_of(kernel) == part


def test_time_in_which_kernels_overlap_counts_once():
    def event(name: str, start: float, end: float, device="CUDA", is_range: bool = False) -> FunctionEvent:
        where = getattr(torch.autograd.DeviceType, device)
        return FunctionEvent(0, name, 0, start, end, device_type=where, is_user_annotation=is_range)

    events = [
        event("Optimizer.step#AdamW.step", 0, 20e6, is_range=True),  # what was named in the program
        event("nvjet_tst_64x8", 10e6, 14e6),
        event("flash_bwd_kernel", 0, 4e6),
        event("elementwise_kernel", 12e6, 15e6),  # the last second of it alone
        event("Command Buffer Full", 3e6, 9e6),
        event("reduce_kernel", 13e6, 13.5e6),
        event("aten::mm", 0, 20e6, "CPU"),
    ]
    parts = profile.kernels(SimpleNamespace(events=lambda: events))
    assert parts == {"attention": 4, "optimizer": 0, "matrix products": 4, profile.OTHER: 1}


def test_a_profile_of_compiled_layers_on_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="nothing is left to compile"):
        profile.measure(arguments("--device", "cuda", "--compile", module=profile))


def test_time_between_operators_is_nobodys():
    cpu = torch.profiler.ProfilerActivity.CPU
    with (
        torch.profiler.profile(activities=[cpu]) as profiler,
        torch.profiler.record_function("Optimizer.step#AdamW.step"),
    ):
        torch.ones(8) @ torch.ones(8, 8)
    by_name = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    assert by_name["Optimizer.step#AdamW.step"] > 0
    parts = profile.operators(profiler)
    assert parts["optimizer"] == 0
    assert sum(parts.values()) == pytest.approx(sum(t for name, t in by_name.items() if name.startswith("aten::")))


def test_what_is_best_adds_up_to_the_models_operations_and_bytes():
    lengths = [300, 700]
    work = Work("650m", "cuda", [lengths], microbatch_tokens=1024, warmup=1, steps=1)
    best = profile.at_best(work, H200)
    flops = skeleton(SIZES["650m"]).flops(lengths, 150)
    numbers = 33 * 1280 * 1000  # of the residual stream in all layers
    rotation = 8 * numbers / 4.3e12
    assert (best["attention"] - rotation + best["matrix products"]) * 780e12 == pytest.approx(flops)
    assert (best["attention"] - rotation) * 780e12 == pytest.approx(12 * 33 * 1280 * (300**2 + 700**2))
    assert best[profile.OTHER] * 4.3e12 == pytest.approx(96 * numbers)
    sharded = profile.at_best(work, H200, sharded=True)
    assert sharded[profile.OTHER] * 4.3e12 == pytest.approx(76 * numbers), "its residual stream is bf16"
    cpu = profile.at_best(dataclasses.replace(work, device="cpu"), H200)
    assert cpu["attention"] * 780e12 == pytest.approx(12 * 33 * 1280 * (300**2 + 700**2))
    assert cpu[profile.OTHER] * 4.3e12 == pytest.approx((2 * 9 * 4 + 5 * 4 * 4 + 8 * 4) * numbers), "it rotates"
    assert best["optimizer"] * 4.3e12 == pytest.approx(40 * 651e6, rel=1e-3)


def test_a_profile_accounts_for_the_whole_step():
    found = profile.profile_steps(TINY, compiled=False)
    assert sum(found["parts"].values()) >= found["seconds_per_step"] * 0.999
    assert min(found["parts"][part] for part in profile.PARTS) > 0
    result = {
        "size": "8m",
        "device": "CPU",
        "torch": "2",
        "compile": False,
        "sharded": False,
        "steps": 2,
        "real_tokens_per_step": 56,
    }
    text = profile.table({**result, **found, "at_best": profile.at_best(TINY, CPU)})
    assert len(text.splitlines()) == 2 + len(profile.PARTS) + 2 + 2


class Reads(TorchDispatchMode):
    """Who reads the value of a tensor, in order: the innermost function on the stack that is not torch's.

    Not what an operator reads by itself, as the CPU's fused AdamW does; nor a DataLoader's seed, once an epoch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.readers: list[str] = []

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        if operator is torch.ops.aten._local_scalar_dense.default:
            frame, of_a_loader = sys._getframe(1), False
            while (module := frame.f_globals["__name__"]).startswith("torch."):
                of_a_loader |= module.startswith("torch.utils.data.")
                frame = frame.f_back
            if not of_a_loader:
                self.readers.append(f"{module}.{frame.f_code.co_name}")
        return operator(*arguments, **(keywords or {}))


def readers(trainer) -> list[str]:
    with Reads() as reads:
        trainer.fit()
    trainer.close()
    return reads.readers


class Linear(ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 3)

    def forward(self, batch):
        return self.net(batch[0])

    def loss(self, outputs, batch):
        return torch.nn.functional.cross_entropy(outputs, batch[1])

    def flops_per_batch(self, batch) -> int:  # for SpeedMonitor
        return 1


def composers_own(work: Work, compiled: bool = False, sharded: bool = False, callbacks: tuple = ()) -> Trainer:
    """Composer without anything of ours, but with the same monitors: as many steps, of two microbatches."""
    on_gpu = work.device == "cuda"
    steps = work.warmup + work.steps
    rows = TensorDataset(torch.randn(2 * steps, 4), torch.randint(3, (2 * steps,)))
    model = Linear()
    return Trainer(
        model=model,
        optimizers=torch.optim.AdamW(model.parameters(), fused=True),
        train_dataloader=DataLoader(rows, batch_size=2, pin_memory=on_gpu),
        device_train_microbatch_size=1,
        max_duration=f"{steps}ba",
        device="gpu" if on_gpu else "cpu",
        precision="amp_bf16" if on_gpu else "fp32",
        algorithms=[composer.algorithms.GradientClipping("norm", 1.0)],
        callbacks=[SpeedMonitor(window_size=10), LRMonitor(), *([MemoryMonitor()] if on_gpu else []), *callbacks],
        progress_bar=False,
    )


# The norm of the gradient, and how many tokens were predicted right: read every tenth update.
OWN_READS = ("esm2_composer.callbacks.batch_end", "esm2_composer.task.take_accuracy")


def test_the_step_reads_no_value_that_composers_own_does_not(monkeypatch):
    """But for two in ten updates, and these only when Composer has waited for the update anyway.

    On a CPU, where the batch is checked and its attention cut by its values: both are left out here.
    """
    monkeypatch.setattr("esm2_composer.model._check_batch", lambda *_: None)
    monkeypatch.setattr(
        "esm2_composer.model.select_attention", lambda *_: Attention("sum", lambda q, k, v, *_: q + k + v)
    )
    work = Work("8m", "cpu", [[40, 9, 20], [30, 12]], microbatch_tokens=40, warmup=0, steps=20)
    ours = readers(make_trainer(work))
    theirs = [reader for reader in ours if not reader.startswith("esm2_composer.")]
    assert Counter(theirs) == Counter(readers(composers_own(work)))
    assert Counter(ours) - Counter(theirs) == dict.fromkeys(OWN_READS, 2)
    steps = [r for r in ours if not r.startswith("composer.callbacks.")]
    last = "composer.trainer.trainer._accumulate_time_across_ranks"  # that Composer reads of an update
    assert all(before in (last, *OWN_READS) for before, reader in pairwise(steps) if reader in OWN_READS)


@pytest.mark.gpu
def test_on_a_gpu_the_step_waits_where_composers_own_does_and_nowhere_else():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    work = Work("8m", "cuda", [[300, 40, 500], [100, 700]], microbatch_tokens=700, warmup=5, steps=10)
    ours, theirs = (
        profile.profile_steps(work, compiled=False, make=make)["waits_per_step"]
        for make in (make_trainer, composers_own)
    )
    for wait in ("item", "device"):
        assert ours[wait] <= theirs[wait] + len(OWN_READS) / 10 + 1e-9
