"""tools/benchmark.py: each of its short measurements runs, small, and shows what it says.

The others have files of their own, test_benchmark_*.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import benchmark
import pytest
import torch
from conftest import ROOT, python


def measure(name: str, *options: str) -> dict[str, Any]:
    result = python(ROOT / "tools/benchmark.py", name, "--json", *options)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_embeddings_come_three_times_as_fast_as_those_of_transformers() -> None:
    """At least, in the same run; 6.5 times by docs/performance.md, of more proteins and on idle cores."""
    ours, theirs = measure("embed", "--proteins", "24", "--rounds", "1", "--batch-sizes", "8")["contenders"]
    assert ours["speed_of_ours_over_it"] == 1
    ratio = ours["real_tokens_per_second"] / theirs["real_tokens_per_second"]
    assert theirs["speed_of_ours_over_it"] == pytest.approx(ratio)
    assert ratio >= 3


def test_parity() -> None:
    rows = measure("parity", "--sizes", "8m", "--layers", "1")["rows"]
    assert [row["reference"] for row in rows] == ["transformers", "fair-esm"]
    assert all(0 < max(row["logit_error"], row["gradient_error"]) <= 1e-4 for row in rows)


@pytest.mark.slow
def test_host() -> None:
    found = measure("host", "--updates", "3", "--rounds", "1", "--ranks", "2")
    rows = found["by_loggers"]
    none = rows[0]["seconds_between_updates"]
    assert [row["loggers"] for row in rows] == ["none", "esm2_composer's", "Composer's"]
    assert all(row["over_none"] == row["seconds_between_updates"] / none for row in rows)
    assert all(0 < row["seconds_between_updates"] < row["seconds_per_update"] for row in rows)
    assert (found["updates"], found["tokens"]) == (3, 16)
    (ranks,) = found["sums"]
    assert (ranks["ranks"], ranks["seconds"] > 0) == (2, True)


def test_sharding() -> None:
    found = measure("sharding", "--ranks", "4", "--together", "1", "3", "--steps", "1")
    cases = [tuple(row[key] for key in ("version", "strategy", "units")) for row in found["by_sharding"]]
    assert cases == [(v, s, n) for v in (1, 2) for s in ("SHARD_GRAD_OP", "FULL_SHARD") for n in (24, 8)]
    assert (found["ranks"], found["steps"], found["seconds_of_a_layer"] > 0) == (4, 1, True)


def test_attention() -> None:
    (row,) = measure("attention", "--sizes", "8m", "--tokens", "1024", "--rounds", "1", "--device", "cpu")["rows"]
    assert (row["size"], row["backend"]) == ("8m", "cpu")
    assert min(row["forward_seconds"], row["backward_seconds"], row["flops"]) > 0


@pytest.mark.gpu
def test_attention_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    rows = measure("attention", "--sizes", "8m", "35m", "650m", "15b", "--tokens", "4096", "--rounds", "2")["rows"]
    assert {"triton", "torch"} <= {row["backend"] for row in rows}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("loader", "--clusters", "10"), "--clusters: 10; it must be at least 2048"),
        (("startup", "--workers", "0"), "--workers: 0; it must be at least 1"),
        (("host", "--ranks", "1"), "--ranks: 1; it must be at least 2"),
        (("sharding", "--together", "25"), "--together: 25; it must be at least 1 and at most 24"),
        (("embed", "--size", "9m"), "argument --size: invalid choice: '9m'"),
        (("attention", "--sizes", "9m"), "argument --sizes: invalid choice: '9m'"),
    ],
)
def test_impossible_sizes_are_one_line(arguments: tuple[str, ...], words: str, call: Callable) -> None:
    code, _, told = call(benchmark.main, *arguments)
    assert code == 2
    assert words in told
    assert len(told.splitlines()) == 1
