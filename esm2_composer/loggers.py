"""What people see of a run: TensorBoard, Weights & Biases, and lines or a bar on the terminal."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger, LoggerDestination, TensorboardLogger, WandBLogger
from composer.utils import dist
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from esm2_composer.errors import UserError, tell
from esm2_composer.recipe.schema import Recipe

LOSS = "loss/train/total"
PERPLEXITY = "metrics/valid/perplexity"


class Deferred(LoggerDestination):
    """Holds metrics back until the next backward pass has been launched; then hands on each step's in one call.

    Composer logs between two updates, a few metrics at a time, when a GPU has nothing to do: TensorBoard and W&B
    would each take a quarter of that time (docs/performance.md). Before a checkpoint is saved, everything must be
    handed on: a run that resumes from it does not produce it again.

    A destination that fails, as on a full disk or when W&B's own process dies, ends the logging, not the run.
    """

    _destination: str  # in what it tells
    _failed = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._held: dict[int | None, dict[str, Any]] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self._held.setdefault(step, {}).update(metrics)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self.hand_on()

    def eval_end(self, state: State, logger: Logger) -> None:
        self.hand_on()

    def close(self, state: State, logger: Logger) -> None:
        self.hand_on()

    def hand_on(self) -> None:
        held, self._held = self._held, {}
        for step, metrics in held.items():
            self._write(metrics, step)

    def _write(self, metrics: dict[str, Any], step: int | None) -> None:
        self._attempt(super().log_metrics, metrics, step)

    def _attempt(self, action: Callable[..., None], *arguments: object) -> None:
        if self._failed:
            return
        try:
            action(*arguments)
        except Exception as error:  # may be that of an earlier write, by another thread; W&B has many types
            self._failed = True
            reason = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
            tell(f"{self._destination} cannot be written ({reason}); going on without")


class WandB(Deferred, WandBLogger):
    """Composer's logger."""

    _destination = "Weights & Biases"

    def init(self, state: State, logger: Logger) -> None:
        super().init(state, logger)
        atexit.register(self.hand_on)  # W&B ends its run at exit, before Composer closes the loggers


def hand_on_all(state: State) -> None:
    """Have the run's loggers write what they hold."""
    for callback in state.callbacks:
        if isinstance(callback, Deferred):
            callback.hand_on()


class TensorBoard(Deferred, TensorboardLogger):
    """Composer's logger, with one event file per start, on rank 0 only. The original opens a file at each flush
    (50,000 in a published run) and, on every rank, at each evaluation, in a folder that looks like another run.
    """

    _destination = "TensorBoard's events"

    def init(self, state: State, logger: Logger) -> None:
        if not dist.get_global_rank():
            self._attempt(super().init, state, logger)

    def eval_end(self, state: State, logger: Logger) -> None:
        self.hand_on()
        self._flush(logger)

    def _flush(self, logger: Logger) -> None:
        if self.writer is None:
            return
        if self.hyperparameters:
            self._attempt(self._write_hyperparameters)
            self.hyperparameters = {}
        self._attempt(self.writer.flush)

    def _write_hyperparameters(self) -> None:
        experiment, start, _ = hparams(self.hyperparameters, dict.fromkeys((LOSS, PERPLEXITY)))
        for summary in (experiment, start):
            self.writer.file_writer.add_summary(summary)

    def close(self, state: State, logger: Logger) -> None:
        self.hand_on()
        if self.writer is not None:
            self._attempt(self.writer.close)
            self.writer = None


class TrainingProgress(Callback):
    """How far the run is: on a terminal a bar, else a line every `interval` updates; and a line per evaluation.

    Composer's bar shows no result of an evaluation, and leaves a trace in checkpoints.
    """

    def __init__(self, updates: int, interval: int) -> None:
        self._updates, self._interval = updates, interval
        self._start: tuple[float, int] | None = None
        self._bar: tqdm | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        if not dist.get_global_rank() and sys.stderr.isatty():
            done = state.timestamp.batch.value
            self._bar = tqdm(total=self._updates, initial=done, unit=" updates", dynamic_ncols=True)

    def batch_end(self, state: State, logger: Logger) -> None:
        update, loss = state.timestamp.batch.value, f"loss {state.total_loss_dict[LOSS]:.4f}"
        if self._start is None:
            self._start = (time.monotonic(), update)
        if self._bar is not None:
            self._bar.set_postfix_str(loss, refresh=False)
            self._bar.update()
        elif not dist.get_global_rank() and (update % self._interval == 0 or update == self._updates):
            since, first = self._start
            speed = (update - first) / (time.monotonic() - since) if update > first else 0
            seconds = (self._updates - update) / speed if speed else 0
            left = f"{seconds / 60:.0f} min" if seconds > 120 else f"{seconds:.0f} s"
            self._say(f"update {update}/{self._updates}: {loss}" + (f", {left} left" if seconds else ""))

    def eval_end(self, state: State, logger: Logger) -> None:
        if not dist.get_global_rank():
            values = ", ".join(f"{name} {float(value):.4f}" for name, value in state.eval_metric_values.items())
            self._say(f"update {state.timestamp.batch.value}/{self._updates}: validation {values}")

    def close(self, state: State, logger: Logger) -> None:
        if self._bar is not None:
            self._bar.close()

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a full disk under a log must not end the run
            tqdm.write(line, file=sys.stderr)  # above the bar, if there is one
            sys.stderr.flush()


def build_loggers(recipe: Recipe) -> list[LoggerDestination]:
    """Those that a recipe asks for."""
    loggers: list[LoggerDestination] = []
    if recipe.tensorboard_folder is not None:
        loggers.append(TensorBoard(log_dir=recipe.tensorboard_folder, flush_interval=10))
    if recipe.loggers.wandb is not None:
        # To W&B every launch is a separate run; the group holds them together.
        settings = dataclasses.asdict(recipe.loggers.wandb)
        loggers.append(WandB(**{**settings, "group": settings["group"] or recipe.run_name}))
    return loggers


def check_wandb() -> None:
    """Raise a UserError if W&B would prompt for a key, which nobody could enter."""
    import wandb

    if os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun") and wandb.api.api_key is None:
        raise UserError(
            "loggers.wandb: no API key here; set WANDB_API_KEY, run `wandb login`, or set WANDB_MODE=offline"
        )
