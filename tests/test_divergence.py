"""What stops a run whose loss diverges, and how to go on then."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from esm2_composer.divergence import Diverged, Divergence, advice
from esm2_composer.loggers import LOSS
from esm2_composer.recipe.config import BRANCH_MAY_CHANGE, changes, load_recipe, to_yaml
from esm2_composer.recipe.schema import Recipe


def watch(losses: list[float], max_rise: float | None = 0.5, done: int = 0) -> tuple[int, int | None]:
    """How many losses were taken before the run was stopped, and the update before it went wrong."""
    guard = Divergence(max_rise)
    for count, loss in enumerate(losses):
        clock = SimpleNamespace(batch=SimpleNamespace(value=done + count + 1))
        try:
            guard.batch_end(SimpleNamespace(total_loss_dict={LOSS: loss}, timestamp=clock), None)
        except Diverged as reason:
            return count, reason.before
    return len(losses), None


def feed(losses: list[float], max_rise: float | None = 0.5) -> int:
    return watch(losses, max_rise)[0]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops_the_run_at_once(loss):
    assert feed([3.0, loss, 3.0]) == 1
    assert feed([3.0, loss, 3.0], max_rise=None) == 1


def test_a_lasting_rise_stops_the_run():
    falling = [3 - 0.01 * i for i in range(80)]
    assert feed(falling + [3.0] * 100) < 120
    assert feed(falling + [3.0] * 100, max_rise=None) == 180
    assert feed(falling + [2.5] * 100) == 180, "less than the limit"


def test_one_bad_batch_does_not():
    assert feed([2.0] * 50 + [8.0] + [2.0] * 50) == 101


def test_the_update_before_a_divergence_is_told_whenever_it_began():
    flat, swaying = [2.0] * 50, [2.0, 2.04] * 500
    rising = [2 + 0.005 * i for i in range(200)]  # 0.05 in ten updates, 0.5 in a hundred
    for start in (flat, swaying):
        stopped, before = watch(start + rising)
        assert stopped > len(start) + 100
        assert len(start) - 20 <= before <= len(start) + 20
    assert watch([*flat, 9.0, 9.0, 9.0]) == (51, 50 - 20)
    assert watch([*flat, *rising[:90], math.nan])[1] < 70
    noise = np.random.default_rng(0).normal(2.0, 0.1, 5000).tolist()  # of batches of 64 sequences
    assert all(watch([*noise[:end], math.nan])[1] >= end - 60 for end in range(1000, 5001, 500))
    assert watch([math.nan], done=1000) == (0, 1001 - 20), "resumed from what was good, as far as is known"


def load(size: str, *overrides: str) -> Recipe:
    return load_recipe(str(ROOT / f"yamls/{size}.yaml"), overrides, data_is_here=False)


def test_advice_names_the_checkpoint_and_what_to_change():
    recipe = load("3b")
    told = advice(recipe, "runs/esm2_3b/checkpoints/ep0-ba1000")
    command = told.rpartition(": ")[2].split()
    changed = load("3b", *command)
    assert changed.run_name != recipe.run_name
    assert changed.save_folder == "runs/esm2_3b_2/checkpoints"
    assert changed.optimizer.lr == recipe.optimizer.lr / 2
    assert changed.load_path == "runs/esm2_3b/checkpoints/ep0-ba1000"
    assert not changes(to_yaml(recipe), changed, BRANCH_MAY_CHANGE)
    assert "load_path" not in advice(recipe, None)
    assert "is kept" in told
    assert "is kept" not in advice(recipe, None, kept=False)
    for folder, new in [
        ("s3://bucket/esm2_3bs", "s3://bucket/esm2_3bs_2"),
        ("s3://esm2_3b/x", "s3://esm2_3b/x_2"),
        ("/esm2_3b/esm2_3b/x/", "/esm2_3b/esm2_3b_2/x"),
    ]:
        assert f"save_folder={new} " in advice(load("3b", f"save_folder={folder}"), None)


@pytest.mark.parametrize("folder", ["/shared/runs/3b/checkpoints", "s3://bucket/runs/esm2_3b/"])
def test_advice_leads_to_another_folder_where_that_is_told(folder):
    told = advice(load("3b", f"save_folder={folder}"), f"{folder}/ep0-ba1000-rank0.pt")
    changed = load("3b", f"save_folder={folder}", *told.rpartition(": ")[2].split())
    assert changed.save_folder == f"{folder.rstrip('/')}_2"
    assert changed.load_path == f"{folder}/ep0-ba1000-rank0.pt"
