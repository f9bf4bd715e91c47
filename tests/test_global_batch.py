"""The global batch and its gradient do not depend on ranks, workers, microbatches or restarts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import global_batches
import numpy as np
import pytest
import torch
from conftest import COPIES, ROOT, composer, python

EPOCH = 4  # batches of 8 in an epoch of the 37 clusters
BATCHES = 10  # two epochs and a half
STOPS = (2, EPOCH, EPOCH + 1)  # in mid-epoch, at its end, in the second

Run = dict[str, Any]


@pytest.fixture
def scenario(fresh: Callable[[], str]) -> Callable[..., Run]:
    def make(**changes: Any) -> Run:
        plain = {"evaluation": False, "workers": 0, "batch": 8, "budget": 10**6, "max_length": 24}
        return {**plain, "state": None, "batches": BATCHES, "shards": fresh(), **changes}

    return make


def see(ranks: int, folder: Path, scenarios: list[Run]) -> list[Run]:
    """Run the scenarios on so many ranks: of each, its global batches, and the state to resume from."""
    folder.mkdir()
    for i, scenario in enumerate(scenarios):
        scenario["out"] = str(folder / str(i))
        if ranks == 1:
            global_batches.run(scenario)
    if ranks > 1:
        (folder / "scenarios.json").write_text(json.dumps(scenarios))
        result = python(ROOT / "tests/global_batches.py", str(ranks), folder / "scenarios.json")
        assert result.returncode == 0, result.stderr
    together = []
    for scenario in scenarios:
        of_rank = [json.loads(Path(f"{scenario['out']}-{rank}.json").read_text()) for rank in range(ranks)]
        assert all(each["microbatches"] == of_rank[0]["microbatches"] for each in of_rank), "on every rank as many"
        shares = zip(*(each["seen"] for each in of_rank), strict=True)
        batches = [sorted(itertools.chain.from_iterable(parts)) for parts in shares]
        work = np.array([each["work"] for each in of_rank])
        together.append({"batches": batches, "work": work, "state": of_rank[0]["state"]})
    return together


def test_global_batches_are_the_same_on_any_ranks_workers_budgets_and_after_any_stop(
    scenario: Callable[..., Run], tmp_path: Path
) -> None:
    def stopped() -> list[Run]:
        return [scenario(batches=stop, workers=int(stop == 2)) for stop in STOPS]

    def resumed(runs: list[Run]) -> list[Run]:
        return [
            scenario(state=run["state"], batches=BATCHES - stop, workers=int(stop == EPOCH))
            for stop, run in zip(STOPS, runs, strict=True)
        ]

    whole, with_workers, *one = see(1, tmp_path / "1", [scenario(), scenario(workers=3, budget=30), *stopped()])
    expected = whole["batches"]
    assert all(len(batch) == len(set(batch)) == 8 for batch in expected)
    assert len(set(itertools.chain(*expected))) == 8 * BATCHES, "what a cluster shows differs between epochs"
    assert with_workers["batches"] == expected

    two, two_with_workers, *runs = see(
        2, tmp_path / "2", [scenario(), scenario(workers=3, budget=30), *resumed(one), *stopped()]
    )
    assert two["batches"] == two_with_workers["batches"] == expected
    two_after_one, two_stopped = runs[:3], runs[3:]
    one_after_two = see(1, tmp_path / "1 after 2", resumed(two_stopped))
    four, *four_after_two = see(4, tmp_path / "4", [scenario(workers=1, budget=50), *resumed(two_stopped)])
    assert four["batches"] == expected
    for after in (two_after_one, one_after_two, four_after_two):
        assert [run["batches"] for run in after] == [expected[stop:] for stop in STOPS]


def test_evaluation_shows_the_same_on_any_ranks_workers_and_budgets(
    scenario: Callable[..., Run], tmp_path: Path
) -> None:
    def scenarios() -> list[Run]:
        return [scenario(evaluation=True, batches=5), scenario(evaluation=True, batches=5, workers=2, budget=30)]

    one, two = see(1, tmp_path / "1", scenarios()), see(2, tmp_path / "2", scenarios())
    assert sum(map(len, one[0]["batches"])) == 37
    assert all(run["batches"] == one[0]["batches"] for run in (*one, *two))


def test_two_ranks_have_equally_much_work_with_real_lengths(
    scenario: Callable[..., Run], real_data: Path, tmp_path: Path
) -> None:
    split = tmp_path / "shards"
    source = ("--clusters", real_data / "tiny/train_clusters.parquet", "--sequences", real_data / "tiny/train.db")
    assert python(ROOT / "tools/convert.py", *source, "--out", split).returncode == 0
    (run,) = see(
        2, tmp_path / "2", [scenario(shards=f"{split}/train", batch=64, max_length=1024, budget=8192, batches=8)]
    )
    slowest_over_mean = run["work"].max(0) / run["work"].mean(0)
    assert run["work"].mean() > 8000 * 2 * 1280, "of so many tokens at least, by a model of that hidden size"
    assert slowest_over_mean.max() < 1.01


def train(shards: Path, out: Path, *overrides: str, ranks: int = 1) -> dict[str, Any]:
    """50 updates of a small model, unclipped: the losses, the gradients' norms and the final weights."""
    result = composer(
        *("-n", str(ranks), ROOT / "tests/gradient_norms.py", out, ROOT / "yamls/demo.yaml"),
        *(f"data.remote={shards}", "data.max_length=128", "model.num_layers=1", "model.hidden_size=32"),
        *("model.ffn_hidden_size=64", "max_duration=50ba", "schedule.warmup=10", "optimizer.clip_norm=1e9"),
        *("eval_interval=50ba", "save_interval=50ba", f"run_name={out.stem}", *overrides),
        cwd=out.parent,
    )
    assert result.returncode == 0, result.stderr
    return torch.load(out, weights_only=True)


@pytest.mark.slow
def test_losses_gradients_and_weights_are_those_of_one_rank_on_two_sharded_or_not(
    shards: Path, tmp_path: Path
) -> None:
    one = train(shards, tmp_path / "one.pt")
    assert len(one["losses"]) == len(one["norms"]) == 50
    parts, sharded = ("device_microbatch_tokens=256",), ("fsdp.version=1", "precision=fp32")
    recomputed, selective = (f"fsdp.activation_checkpointing={what}" for what in ("true", "selective"))
    others = {
        "in small parts": train(shards, tmp_path / "parts.pt", *parts),
        "replicated": train(shards, tmp_path / "replicated.pt", *parts, ranks=2),
        "sharded": train(shards, tmp_path / "sharded.pt", *parts, *sharded, ranks=2),
        "sharded, recomputed": train(shards, tmp_path / "again.pt", *parts, *sharded, recomputed, ranks=2),
        "sharded, copied": train(shards, tmp_path / "copied.pt", *parts, *sharded, *COPIES, ranks=4),
        "sharded by version 2": train(shards, tmp_path / "sharded2.pt", *parts, "fsdp.version=2", ranks=2),
        "that, recomputed": train(shards, tmp_path / "again2.pt", *parts, "fsdp.version=2", recomputed, ranks=2),
        "that, selective": train(shards, tmp_path / "again3.pt", *parts, "fsdp.version=2", selective, ranks=2),
    }
    for name, other in others.items():
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert other["norms"] == pytest.approx(one["norms"], rel=1e-5)
        assert other["weights"].keys() == one["weights"].keys()
        differences = {key: (other["weights"][key] - weight).abs() for key, weight in one["weights"].items()}
        furthest = max(differences, key=lambda key: differences[key].max())
        apart = (
            max(abs(ours / theirs - 1) for ours, theirs in zip(other[key], one[key], strict=True))
            for key in ("losses", "norms")
        )
        print("{}: losses at most {:.1e}, norms {:.1e} apart, relative".format(name, *apart))
        print(f"{name}: weights at most {differences[furthest].max():.1e} apart, {furthest}")
        assert differences[furthest].max() <= 1e-5
