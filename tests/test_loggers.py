"""What people see of a run, and when it is written."""

import contextlib
import errno
import io
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from composer.loggers import LoggerDestination
from conftest import ROOT, python
from outcomes import read_scalars
from tensorboard.summary.writer.record_writer import RecordWriter

from esm2_composer.distributed.collectives import say
from esm2_composer.errors import UserError
from esm2_composer.loggers import LOSS, Deferred, TensorBoard, TrainingProgress, check_wandb, hand_on_all


class Told(LoggerDestination):
    """Keeps what it is told, call by call."""

    def __init__(self) -> None:
        self.calls: list[tuple[int | None, dict[str, Any]]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.calls.append((step, metrics))


class DeferredTold(Deferred, Told):
    pass


@pytest.mark.parametrize("event", ["after_train_batch", "eval_end", "close"])
def test_metrics_wait_for_the_next_launch_and_each_steps_come_in_one_call(event):
    logger = DeferredTold()
    logger.log_metrics({"loss": 2.0}, 6)
    logger.log_metrics({"lr": 1.0}, 7)
    logger.log_metrics({"tokens": 9, "time": 1}, 7)
    assert logger.calls == []
    getattr(logger, event)(None, None)
    expected = [(6, {"loss": 2.0}), (7, {"lr": 1.0, "tokens": 9, "time": 1})]
    assert logger.calls == expected
    getattr(logger, event)(None, None)
    assert logger.calls == expected


def test_all_loggers_are_made_to_write_what_they_hold():
    loggers = [DeferredTold(), DeferredTold()]
    for logger in loggers:
        logger.log_metrics({"loss": 2.0}, 6)
    hand_on_all(SimpleNamespace(callbacks=[*loggers, TrainingProgress(9, 1)]))
    assert [logger.calls for logger in loggers] == [[(6, {"loss": 2.0})]] * 2


def test_what_was_held_at_the_end_is_in_the_file(tmp_path):
    logger = TensorBoard(log_dir=str(tmp_path), flush_interval=10)
    state = SimpleNamespace(run_name="run", timestamp=SimpleNamespace(batch=1))
    logger.init(state, None)
    logger.log_metrics({LOSS: 2.0}, 1)
    logger.close(state, None)
    assert read_scalars(tmp_path / "run", LOSS) == {1: 2.0}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_ends_tensorboard_and_not_the_run(tmp_path, monkeypatch, capsys):
    logger = TensorBoard(log_dir=str(tmp_path), flush_interval=1)
    clock = SimpleNamespace(batch=1)
    state = SimpleNamespace(run_name="run", timestamp=clock)
    logger.init(state, None)
    logger.log_metrics({"loss": 2.0}, 1)
    logger.after_train_batch(state, None)
    logger.batch_end(state, None)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", full)
    writer = logger.writer.file_writer.event_writer._async_writer._worker
    for step in range(2, 40):
        logger.log_metrics({"loss": 2.0}, step)
        logger.after_train_batch(state, None)
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
    for step in range(3):
        logger.log_metrics({"loss": 2.0}, step)
        logger.after_train_batch(None, None)
        assert not logger._held, "it would fill the memory"
    logger.close(None, None)
    assert capsys.readouterr().err.count("going on without") == 1


class Gone(LoggerDestination):
    """As W&B's logger where the process that it writes to has died."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class DeferredGone(Deferred, Gone):
    _destination = "Weights & Biases"


def test_a_destination_that_is_gone_does_not_end_the_run(capsys):
    logger = DeferredGone()
    for step in range(3):
        logger.log_metrics({"loss": 2.0}, step)
        hand_on_all(SimpleNamespace(callbacks=[logger]))  # as before a save
        assert not logger._held, "it would fill the memory"
    told = "Weights & Biases cannot be written (Broken pipe); going on without\n"
    assert capsys.readouterr().err == told


def test_a_log_that_is_full_does_not_end_the_run(monkeypatch):
    progress = TrainingProgress(updates=9, interval=1)
    timestamp = SimpleNamespace(batch=SimpleNamespace(value=1))
    state = SimpleNamespace(timestamp=timestamp, total_loss_dict={LOSS: 2.5}, eval_metric_values={"loss": 2.25})
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        progress.batch_end(state, None)
        progress.eval_end(state, None)
        say("a line")
        with contextlib.suppress(OSError):
            full.close()


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("screen", [Screen(), io.StringIO()], ids=["terminal", "log"])
def test_a_terminal_shows_a_bar_and_a_log_lines_and_both_every_evaluation(screen, monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen)
    progress = TrainingProgress(updates=9, interval=2)
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


FAILS = """
from types import SimpleNamespace
from esm2_composer.loggers import WandB
logger = WandB(project="test")
logger.init(SimpleNamespace(run_name="run"), None)
logger.log_metrics({"loss/at/the/end": 2.0}, 1)
raise RuntimeError("a defect")
"""


def test_what_was_held_when_a_run_failed_is_in_wandbs_file(tmp_path):
    result = python("-c", FAILS, cwd=tmp_path, WANDB_MODE="offline", PYTHONPATH=str(ROOT))
    assert [line for line in result.stderr.splitlines() if "Error" in line] == ["RuntimeError: a defect"]
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"loss/at/the/end" in file.read_bytes()


def test_wandb_without_a_key_is_told_before_training(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where `wandb login` leaves it
    with pytest.raises(UserError, match="set WANDB_API_KEY"):
        check_wandb()
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb()
