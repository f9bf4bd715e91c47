"""What happens around the steps of a run: preemption, and what people see of it."""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger, ProgressBarLogger, WandBLogger
from composer.utils import dist

EXIT_PREEMPTED = 75  # sysexits.h EX_TEMPFAIL: run me again


class Preemption(Callback):
    """On SIGTERM or SIGUSR1 to any rank: finish the step, save, stop.

    Composer's own handler would leave at once, without a checkpoint.
    """

    def __init__(self) -> None:
        self.preempted = False
        self._signalled = False

    def fit_start(self, state: State, logger: Logger) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self._signalled = True

    def batch_end(self, state: State, logger: Logger) -> None:
        flag = state.device.tensor_to_device(torch.tensor(int(self._signalled)))
        dist.all_reduce(flag, reduce_operation="MAX")
        if flag.item():
            self.preempted = True
            state.evaluators = []  # there is no time left for the evaluation at a run's end
            state.stop_training()  # and Composer saves a run that ends


class ProgressBar(ProgressBarLogger):
    """Composer's bar, which leaves no trace in checkpoints: a sharded one could not be resumed without a
    terminal if it was saved with one, nor the other way round."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Wandb(WandBLogger):
    """Composer's logger, which on resuming is asked for the checkpoint too, and without a network would fail."""

    def download_file(self, remote_file_name: str, *args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError(remote_file_name)  # checkpoints are in the save folder


class ProgressLines(Callback):
    """One line every `interval` updates, for logs that are no terminal."""

    def __init__(self, updates: int, interval: int) -> None:
        self._updates, self._interval = updates, interval
        self._start: tuple[float, int] | None = None

    def batch_end(self, state: State, logger: Logger) -> None:
        update = state.timestamp.batch.value
        if self._start is None:
            self._start = (time.monotonic(), update)
        if dist.get_global_rank() or (update % self._interval and update != self._updates):
            return
        since, first = self._start
        speed = (update - first) / (time.monotonic() - since) if update > first else 0
        left = f", {(self._updates - update) / speed / 60:.1f} min left" if speed else ""
        loss = float(state.total_loss_dict["loss/train/total"])
        self._say(f"update {update}/{self._updates}: loss {loss:.4f}{left}")

    def eval_end(self, state: State, logger: Logger) -> None:
        if not dist.get_global_rank():
            values = ", ".join(f"{name} {float(value):.4f}" for name, value in state.eval_metric_values.items())
            self._say(f"update {state.timestamp.batch.value}/{self._updates}: validation {values}")

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
