"""benchmark.py step and profile: all contenders get the same work, and figures follow from what was timed."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
from collections import Counter
from functools import partialmethod
from itertools import pairwise
from types import SimpleNamespace

import benchmark
import composer.algorithms
import pytest
import torch
from benchmarks import profile, step
from benchmarks.contenders import (
    Failure,
    Outcome,
    Work,
    contenders,
    esm_efficient,
    flat_microbatches,
    knows_sdpa,
    make_trainer,
    ours,
    padded,
    padded_microbatches,
    share_of,
    transformers_esm,
)
from benchmarks.limits import Limits
from composer import Trainer
from composer.callbacks import LRMonitor, MemoryMonitor, SpeedMonitor
from composer.models import ComposerModel
from torch.autograd.profiler_util import FunctionEvent
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from esm2_composer import fp8
from esm2_composer.alphabet import PAD
from esm2_composer.attention import Attention
from esm2_composer.errors import UserError
from esm2_composer.model import SIZES
from esm2_composer.plan import GPUS, gpu_named, skeleton

H200 = Limits("NVIDIA H200", 989e12, 780e12, 4.3e12, 141e9)
CPU = Limits("CPU, 2 threads", None, 1e11, 1e10, None)
TINY = Work("8m", "cpu", [[40, 9, 20], [30, 12]], microbatch_tokens=1024, warmup=1, steps=2)


def arguments(*given: str, module=step) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(given)


@pytest.mark.parametrize(("width", "slots"), [(1024, 2048), (None, 60), (None, 10**6)])
def test_padded_batches_hold_the_same_sequences_and_masks_within_their_slots(width, slots):
    lengths = [30, 7, 31, 29, 5]
    share = share_of(lengths)
    tokens, labels = [], []
    for inputs, targets in padded_microbatches(lengths, width, slots):
        assert inputs.numel() <= slots
        assert width is None or inputs.shape[1] == width
        tokens += [row[row != PAD] for row in inputs]
        labels += [each[: len(row[row != PAD])] for row, each in zip(inputs, targets, strict=True)]
    assert torch.equal(torch.cat(tokens), share["tokens"].long())
    assert torch.equal(torch.cat(labels), share["labels"].long())


@pytest.mark.parametrize("slots", [60, 10**6])
def test_flat_batches_hold_the_same_sequences_and_masks_within_their_slots(slots):
    lengths = [30, 7, 31, 29, 5]
    share = share_of(lengths)
    tokens, cu_seqlens, labels = zip(*flat_microbatches(lengths, slots), strict=True)
    assert max(map(len, tokens)) <= slots
    assert len(tokens) == (1 if slots > 102 else 3)
    assert torch.cat([each.diff() for each in cu_seqlens]).tolist() == lengths
    assert torch.equal(torch.cat(tokens), share["tokens"].long())
    assert torch.equal(torch.cat(labels), share["labels"].long())


class LikeEsmEfficient(torch.nn.Module):
    """Called as esm-efficient's model is, and calling flash-attn as it does."""

    def __init__(self, num_layers, embed_dim, attention_heads, dtype):
        super().__init__()
        self.shape = (attention_heads, embed_dim // attention_heads)
        self.embed_tokens = torch.nn.Embedding(33, embed_dim, dtype=dtype)

    def forward(self, tokens, pad_args):
        from flash_attn import flash_attn_varlen_func

        x = self.embed_tokens(tokens)
        q = x.view(-1, *self.shape)
        lengths = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), pad_args[0])
        lengths |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), pad_args[1])
        mixed = flash_attn_varlen_func(q, q, q, **lengths, dropout_p=0.0, causal=False)
        return (x + mixed.flatten(1)) @ self.embed_tokens.weight.T


@pytest.mark.parametrize("real", [False, True])
def test_esm_efficient_trains_without_padding(real, monkeypatch):
    for name in ("flash_attn", "flash_attn.bert_padding"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *of: None if "flash" in name else find(name, *of))
    if real and find("esme") is None:
        pytest.skip("esm-efficient is not installed")
    if not real:
        monkeypatch.setitem(sys.modules, "esme", SimpleNamespace(ESM2=LikeEsmEfficient))
    found = esm_efficient(TINY)
    assert found.attention == "cpu"
    assert len(found.seconds) == TINY.steps


def test_a_gpu_gets_batches_that_fill_a_microbatch_of_the_size_that_plan_finds():
    found = {}
    for size in ("650m", "3b"):
        work = step.make_work(arguments("--size", size, "--device", "cuda"), H200)
        found[size] = work.microbatch_tokens
        assert all(0.98 < sum(lengths) / work.microbatch_tokens <= 1 for lengths in work.batches)
        assert work.batches[0] != work.batches[1]
    assert found["650m"] == step.ON_GPU
    assert 16384 <= found["3b"] < found["650m"]
    with pytest.raises(UserError, match="leave no room"):
        step.make_work(arguments("--size", "15b", "--device", "cuda"), H200)


def test_a_650m_on_80_gb_takes_32k_tokens_a_microbatch():
    h100 = Limits("NVIDIA H100 80GB HBM3", 989e12, 700e12, 2.8e12, 80e9)
    assert step.make_work(arguments("--size", "650m", "--device", "cuda"), h100).microbatch_tokens >= 32768


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L4", None),
    ],
)
def test_gpus_are_known_by_name(name, gpu):
    assert gpu_named(name) is (gpu and GPUS[gpu])


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--size", "9m"], "--size 9m; there are: 8m"),
        (["--batches", "0"], "--batches 0; it must be at least 1"),
        (["--microbatch-tokens", "1000"], "--microbatch-tokens 1000; it must be at least 1024"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--device", "cuda"], "no GPU here"),
    ],
)
def test_impossible_measurements_are_refused(given, complaint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=complaint):
        step.measure(arguments(*given))


@pytest.mark.parametrize("contender", [ours, padded])
def test_a_contender_times_the_steps_that_count(contender):
    found = step.in_own_process(contender, TINY)  # the peak of this one may lie behind it
    assert len(found.seconds) == TINY.steps
    assert min(found.seconds) > 0
    assert found.peak_bytes > 12 * 7_500_000  # gradients and two moments at least


def test_the_fp8_contender_computes_in_fp8(monkeypatch):
    assert "esm2_composer, fp8" in contenders("cuda", "8m")
    changed = []
    use_fp8 = fp8.use_fp8
    monkeypatch.setattr(fp8, "use_fp8", lambda net: (changed.append(net), use_fp8(net)))
    assert len(ours(TINY, fp8=True).seconds) == TINY.steps
    (net,) = changed
    assert net.layers[0].fc1.product is fp8.FP8


def test_figures_are_medians_by_batch():
    batches = [[100] * 4, [200] * 4]
    work = Work("8m", "cuda", batches, microbatch_tokens=1024, warmup=1, steps=4)
    rounds = [
        Outcome([2.0, 1.0, 2.2, 1.1], 2**20, "sdpa"),
        Outcome([2.0, 1.0, 1.8, 9.0], 2**21, "sdpa"),
    ]  # begins with the second
    failures = {"b": Failure("out of memory at 512 tokens a microbatch", out_of_memory=True)}
    budgets = {"esm2_composer": 1024, "b": 512}
    result = step.summary(work, [H200], {"esm2_composer": rounds, "b": []}, budgets, failures)
    row, none = result["contenders"]
    assert row["seconds_per_step"] == pytest.approx((2.0 + 1.05) / 2)
    assert row["real_tokens_per_second"] == pytest.approx(1200 / 3.05)
    assert (row["steps"], row["peak_mib"]) == (8, 2)
    flops = sum(skeleton(SIZES["8m"]).flops(b, round(0.15 * sum(b))) for b in batches)
    assert row["mfu"] == pytest.approx(flops / 3.05 / 989e12)
    assert row["share_of_product"] == pytest.approx(flops / 3.05 / 780e12)
    assert none["real_tokens_per_second"] is None
    lines = step.table(result).splitlines()
    assert "1.00x" in lines[-2]
    assert lines[-1].endswith("failed: out of memory at 512 tokens a microbatch")


def broken(work: Work) -> Outcome:
    raise ImportError("no kernel\nin here")


def hungry(work: Work) -> Outcome:
    if work.microbatch_tokens > 1024:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return Outcome([2.0, 2.0], 2**20, "sdpa")


@pytest.mark.parametrize(
    "names", [("esm2_composer", "peer", "hungry"), ("peer", "hungry"), ("esm2_composer", "b")]
)
def test_a_contender_that_fails_becomes_a_row_that_says_why(names, monkeypatch, call):
    found = {name: lambda work: Outcome([1.0, 1.0], 2**20, "sdpa") for name in names}
    found |= {"peer": broken, "hungry": hungry} if "peer" in names else {"esm2_composer": broken}
    monkeypatch.setattr("benchmarks.contenders.contenders", lambda *_: found)
    monkeypatch.setattr(step, "contenders", lambda *_: found)
    monkeypatch.setattr(step, "in_own_process", lambda function, *given: function(*given))
    monkeypatch.setattr(step, "measure_limits", lambda device: CPU)
    code, out, err = call(benchmark.main, "step", "--device", "cpu", "--microbatch-tokens", "2048", "--json")
    rows = {row["name"]: row for row in json.loads(out)["contenders"]}
    assert list(rows) == list(found)
    assert code == (1 if "b" in names else 0)  # ours failed
    for name, row in rows.items():
        if found[name] is broken:
            assert (row["real_tokens_per_second"], row["failure"]) == (None, "ImportError: no kernel in here")
        else:
            assert row["seconds_per_step"] == (2.0 if name == "hungry" else 1.0)
            assert row["failure"] is None
            assert row["microbatch_tokens"] == (1024 if name == "hungry" else 2048)
    assert sum(line.endswith("failed: ImportError: no kernel in here") for line in err.splitlines()) == 1
    assert err.count("raise ImportError") == 1  # it is not tried again


@pytest.mark.parametrize("turns", [1, 4])
def test_ctrl_c_ends_with_what_was_measured_by_then(turns, monkeypatch, call):
    left = iter(range(turns))

    def contender(work: Work) -> Outcome:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return Outcome([1.0, 1.0], 2**20, "sdpa")

    found = dict.fromkeys(("esm2_composer", "peer", "another"), contender)
    monkeypatch.setattr("benchmarks.contenders.contenders", lambda *_: found)
    monkeypatch.setattr(step, "contenders", lambda *_: found)
    monkeypatch.setattr(step, "in_own_process", lambda function, *given: function(*given))
    monkeypatch.setattr(step, "measure_limits", lambda device: CPU)
    code, out, _ = call(benchmark.main, "step", "--device", "cpu", "--json")
    rows = json.loads(out)["contenders"]
    assert code == 0  # ours was measured
    assert [row.get("steps") for row in rows] == ([2, None, None] if turns == 1 else [4, 2, 2])
    assert [row["failure"] for row in rows] == ([None, *["interrupted"] * 2] if turns == 1 else [None] * 3)


def test_a_contender_whose_process_is_killed_has_failed(monkeypatch):
    start = step.in_own_process
    monkeypatch.setattr(step, "in_own_process", lambda *_: start(os._exit, 9))
    assert "killed" in step.attempt("a", TINY).reason


@pytest.mark.parametrize("knows", [True, False])
def test_transformers_without_sdpa_takes_part_with_it_too(knows, monkeypatch):
    monkeypatch.setattr("transformers.EsmForMaskedLM._supports_sdpa", knows)
    peers = ["transformers"] if knows else ["transformers", "transformers, sdpa patched in"]
    on_cpu = [f"{peer}, padded to {width}" for peer in peers for width in ("1024", "longest")]
    ours = ["esm2_composer", "esm2_composer, compiled"]
    assert [name for name in contenders("cpu", "650m") if "faesm" not in name] == ours + on_cpu
    optional = ("faesm", "esm-efficient", "flash-attn", "fp8")
    everywhere = {"esm2_composer", "esm2_composer, torch's attention, compiled"}
    everywhere |= {*on_cpu, *(f"{name}, compiled" for name in on_cpu)}
    for size, more in (("8m", set()), ("650m", {"esm2_composer, FSDP"})):  # as the recipes have it
        on_gpu = {name for name in contenders("cuda", size) if not any(part in name for part in optional)}
        assert on_gpu == everywhere | more
    assert max(map(len, on_gpu)) <= step.NAME


def test_transformers_layers_share_one_compiled_graph(monkeypatch):
    """Transformers 4.53 remembers a length and is compiled anew for others; a lone sequence has its own."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compile, backend="eager"))
    many = dataclasses.replace(TINY, batches=[[40, 9, 20, 21, 60, 80], [30, 12, 50, 51]], microbatch_tokens=100)
    assert len(padded(many, compiled=True).seconds) == 2
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("attention", [None, "eager", "sdpa"])
def test_transformers_attention_is_the_one_told_and_gives_the_same_logits(attention):
    logits = []
    ((inputs, _),) = padded_microbatches([40, 9, 20], None, 1024)
    for chosen in ("eager", attention):
        torch.manual_seed(0)
        model, used = transformers_esm("8m", chosen)
        calls = Calls()
        with torch.no_grad(), calls:
            logits.append(model.eval()(input_ids=inputs, attention_mask=(inputs != PAD).long())["logits"])
        assert any("scaled_dot_product" in name for name in calls.names) == (used == "sdpa")
    assert used == attention or (attention is None and used == ("sdpa" if knows_sdpa() else "eager"))
    assert (logits[0] - logits[1])[inputs != PAD].abs().max() < 1e-4


class Calls(TorchDispatchMode):
    """The names of torch's operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        self.names.add(str(operator))
        return operator(*arguments, **(keywords or {}))


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


@pytest.mark.gpu
def test_on_a_gpu_every_contender_runs():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    given = ["--device", "cuda", "--microbatch-tokens", "2048", "--steps", "2", "--rounds", "1", "--batches", "1"]
    result = step.measure(arguments(*given))
    failures = [row["failure"] for row in result["contenders"] if row["failure"]]
    assert not [failure for failure in failures if "has no fp8 products" not in failure]
    assert result["contenders"][0]["peak_mib"] > 100


def test_the_trainer_is_set_up_as_the_recipe_says():
    trainer = make_trainer(TINY)
    (optimizer,) = trainer.state.optimizers
    assert optimizer.defaults["betas"] == (0.9, 0.98)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert trainer.state.precision.value == "fp32"
    trainer.close()
