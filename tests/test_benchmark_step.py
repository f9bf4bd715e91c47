"""benchmark.py step: all contenders get the same work, and figures follow from what was timed."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
from functools import partialmethod
from types import SimpleNamespace

import benchmark
import pytest
import torch
from benchmarks import step
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
from torch.utils._python_dispatch import TorchDispatchMode

from esm2_composer import fp8
from esm2_composer.alphabet import PAD
from esm2_composer.command import ArgumentParser
from esm2_composer.errors import UserError
from esm2_composer.model import SIZES
from esm2_composer.recipe.architecture import skeleton
from esm2_composer.recipe.gpus import GPUS, gpu_named

H200 = Limits("NVIDIA H200", 989e12, 780e12, 4.3e12, 141e9)
CPU = Limits("CPU, 2 threads", None, 1e11, 1e10, None)
TINY = Work("8m", "cpu", [[40, 9, 20], [30, 12]], microbatch_tokens=1024, warmup=1, steps=2)


def arguments(*given: str, module=step) -> argparse.Namespace:
    parser = ArgumentParser()
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


def on_gpu(size: str) -> argparse.Namespace:
    given = arguments("--size", size)
    given.device = "cuda"  # which the command line refuses where there is none
    return given


def test_a_gpu_gets_batches_that_fill_a_microbatch_of_the_size_that_plan_finds():
    found = {}
    for size in ("650m", "3b"):
        work = step.make_work(on_gpu(size), H200)
        found[size] = work.microbatch_tokens
        assert all(0.98 < sum(lengths) / work.microbatch_tokens <= 1 for lengths in work.batches)
        assert work.batches[0] != work.batches[1]
    assert found["650m"] == step.ON_GPU
    assert 16384 <= found["3b"] < found["650m"]
    with pytest.raises(UserError, match="leave no room"):
        step.make_work(on_gpu("15b"), H200)


def test_a_650m_on_80_gb_takes_32k_tokens_a_microbatch():
    h100 = Limits("NVIDIA H100 80GB HBM3", 989e12, 700e12, 2.8e12, 80e9)
    assert step.make_work(on_gpu("650m"), h100).microbatch_tokens >= 32768


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
        (["--size", "9m"], "argument --size: invalid choice: '9m'"),
        (["--batches", "0"], "--batches: 0; it must be at least 1"),
        (["--microbatch-tokens", "1000"], "--microbatch-tokens: 1000; it must be at least 1024"),
        (["--rounds", "0"], "--rounds: 0; it must be at least 1"),
        (["--device", "cuda"], "no GPU here"),
    ],
)
def test_impossible_measurements_are_refused(given, complaint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=complaint):
        step.measure(arguments(*given))


@pytest.mark.parametrize("contender", [ours, pytest.param(padded, marks=pytest.mark.slow)])
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
    """Transformers 4.53 remembers a length and is compiled anew for others, by torch 2.11 for each of the seven
    here; a lone sequence has its own. Six layers that share nothing would have 24 graphs or more."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compile, backend="eager"))
    many = dataclasses.replace(TINY, batches=[[40, 9, 20, 21, 60, 80], [30, 12, 50, 51]], microbatch_tokens=100)
    assert len(padded(many, compiled=True).seconds) == 2
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8
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
