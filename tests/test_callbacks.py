"""What stops a run, and what leaves no trace in its checkpoints."""

import math
from types import SimpleNamespace

import pytest
from conftest import ROOT

from esm2_composer.callbacks import LOSS, Diverged, Divergence, ProgressBar, advice
from esm2_composer.config import load_recipe


def feed(losses: list[float], max_rise: float | None = 0.5) -> int:
    """How many losses were taken before the run was stopped."""
    guard = Divergence(max_rise)
    for count, loss in enumerate(losses):
        try:
            guard.batch_end(SimpleNamespace(total_loss_dict={LOSS: loss}), None)
        except Diverged:
            return count
    return len(losses)


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


def test_advice_names_the_checkpoint_and_what_to_change(tmp_path):
    recipe = load_recipe(str(ROOT / "yamls/3b.yaml"), data_is_here=False)
    told = advice(recipe, "runs/esm2_3b/checkpoints/ep0-ba1000")
    command = told.rpartition(": ")[2].split()
    changed = load_recipe(str(ROOT / "yamls/3b.yaml"), command, data_is_here=False)
    assert changed.run_name != recipe.run_name
    assert changed.optimizer.lr == recipe.optimizer.lr / 2
    assert changed.model.init_from == "runs/esm2_3b/checkpoints/ep0-ba1000"
    assert "model.init_from" not in advice(recipe, None)


def test_the_progress_bar_leaves_nothing_in_a_checkpoint_and_takes_nothing_from_one():
    bar = ProgressBar()
    assert bar.state_dict() == {}
    bar.load_state_dict({"train_pbar": {"n": 3}})
    assert bar.train_pbar is None
