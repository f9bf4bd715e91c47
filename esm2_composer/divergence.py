"""A loss that diverges: when to stop, and how to continue."""

from __future__ import annotations

import math
from collections import deque

from composer.core import Callback, State
from composer.loggers import Logger

from esm2_composer.loggers import LOSS
from esm2_composer.recipe.schema import Recipe


class Diverged(Exception):
    """Raised on all ranks at once, after an update that went wrong; `before` is the last update known to precede
    the rise."""

    def __init__(self, reason: str, before: int) -> None:
        super().__init__(reason)
        self.before = before


class Divergence(Callback):
    """Raises `Diverged` when the loss is not finite, or has risen for good.

    "For good": the mean of the last `WINDOW` losses exceeds the lowest such mean of this start by `max_rise`.
    """

    WINDOW = 20

    def __init__(self, max_rise: float | None) -> None:
        self._max_rise = math.inf if max_rise is None else max_rise
        self._losses: deque[float] = deque(maxlen=self.WINDOW)
        self._lowest = math.inf
        self._before = 0

    def batch_end(self, state: State, logger: Logger) -> None:
        update = state.timestamp.batch.value
        loss = state.total_loss_dict[LOSS]  # on the host already, and the same on all ranks
        if len(self._losses) < self.WINDOW:
            self._before = update - self.WINDOW  # nothing is known about earlier updates
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss}", self._before)
        self._losses.append(loss)
        if len(self._losses) < self.WINDOW:
            return
        mean = sum(self._losses) / self.WINDOW
        self._lowest = min(self._lowest, mean)
        if mean <= self._lowest + self._max_rise / 4:  # it may vary by this much where batches are small
            self._before = update - self.WINDOW
        if mean > self._lowest + self._max_rise:
            message = f"the loss has risen from {self._lowest:.3f} to {mean:.3f}, means of {self.WINDOW} updates"
            raise Diverged(message, self._before)


def advice(recipe: Recipe, checkpoint: str | None, kept: bool = True) -> str:
    """How to continue after a divergence: from the last checkpoint before it, if there is one, at half the rate.

    `kept` says whether the state after it was saved.
    """
    folder, name = recipe.save_folder.rstrip("/"), f"{recipe.run_name}_2"
    before, named, after = f"{folder}/".rpartition(f"/{recipe.run_name}/")
    new_folder = f"{before}/{name}/{after}".rstrip("/") if named and not before.endswith("/") else f"{folder}_2"
    new_run = f"run_name={name} save_folder={new_folder} optimizer.lr={recipe.optimizer.lr / 2:g}"
    message = f"The state is kept in {folder} as diverged-*, not to be resumed from. " if kept else ""
    if checkpoint is None:
        return f"{message}Start again with a lower rate or a longer warmup, such as: {new_run}"
    return f"{message}Go on from before as a new run: {new_run} load_path={checkpoint}"
