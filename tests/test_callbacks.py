"""What stops a run, and what people see of it."""

import errno
import io
import math
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from tensorboard.summary.writer.record_writer import RecordWriter

from esm2_composer.callbacks import LOSS, Diverged, Divergence, Progress, TensorBoard, advice
from esm2_composer.config import Recipe, load_recipe


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
    assert changed.model.init_from == "runs/esm2_3b/checkpoints/ep0-ba1000"
    assert "model.init_from" not in advice(recipe, None)
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
    stored = folder.startswith("s3")
    assert (f"Download {folder}/ep0-ba1000-rank0.pt. Go on" in told) == stored
    assert changed.model.init_from == ("" if stored else f"{folder}/") + "ep0-ba1000-rank0.pt"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_ends_tensorboard_and_not_the_run(tmp_path, monkeypatch, capsys):
    logger = TensorBoard(log_dir=str(tmp_path), flush_interval=1)
    clock = SimpleNamespace(batch=1)
    state = SimpleNamespace(run_name="run", timestamp=clock)
    logger.init(state, None)
    logger.log_metrics({"loss": 2.0}, 1)
    logger.batch_end(state, None)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", full)
    writer = logger.writer.file_writer.event_writer._async_writer._worker
    for step in range(2, 40):
        logger.log_metrics({"loss": 2.0}, step)
        logger.batch_end(state, None)
    logger.eval_end(state, None)
    logger.close(state, None)
    writer.join()
    told = [line for line in capsys.readouterr().err.splitlines() if "TensorBoard" in line]
    assert told == ["TensorBoard's events cannot be written (No space left on device); going on without"]
    (events,) = (tmp_path / "run").glob("events.*")
    assert "loss" in events.read_bytes().decode(errors="ignore"), "what was written before stays"


def test_a_tensorboard_folder_that_cannot_be_made_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    logger = TensorBoard(log_dir=str(tmp_path / "taken"))
    logger.init(SimpleNamespace(run_name="run"), None)
    logger.log_metrics({"loss": 2.0}, 1)
    logger.close(None, None)
    assert capsys.readouterr().err.count("going on without") == 1


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
        assert lines[-1] == "update 9/9: loss 2.5000"
        assert not bars
