"""What stops a run, and what people see of it."""

import io
import math
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from esm2_composer.callbacks import LOSS, Diverged, Divergence, Progress, advice
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


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("screen", [Screen(), io.StringIO()], ids=["terminal", "log"])
def test_a_terminal_shows_a_bar_and_a_log_lines_and_both_every_evaluation(screen, monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen)
    progress = Progress(updates=9, interval=2)
    for update in range(4, 9):  # resumed after 4 updates
        batch = SimpleNamespace(value=update)
        state = SimpleNamespace(timestamp=SimpleNamespace(batch=batch), total_loss_dict={LOSS: 2.5})
        if update == 4:
            progress.fit_start(state, None)
        batch.value += 1
        progress.batch_end(state, None)
    progress.eval_end(SimpleNamespace(timestamp=state.timestamp, eval_metric_values={"loss": 2.25}), None)
    progress.close(state, None)
    told = screen.getvalue().replace("\r", "\n").splitlines()
    assert "update 9/9: validation loss 2.2500" in [line.strip() for line in told]
    lines = [line for line in told if line.startswith("update") and "validation" not in line]
    bars = [line for line in told if "9/9 [" in line and "loss 2.5000" in line]
    if screen.isatty():
        assert bars
        assert not lines
    else:
        assert [line.split(":")[0] for line in lines] == ["update 6/9", "update 8/9", "update 9/9"]
        assert lines[-1] == "update 9/9: loss 2.5000, 0.0 min left"
        assert not bars
