"""Saves checkpoints, keeps the newest and the best of them, and survives a full disk or a failing store.

Composer's own saver writes to the final name, forgets at each restart what it keeps, and in a store deletes
nothing and updates its latest-pointer late. The format is Composer's, whose Trainer loads what this writes.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from composer.utils.checkpoint import save_checkpoint
from torch.distributed.checkpoint import CheckpointException

from esm2_composer.checkpoints.folders import Folder, ask
from esm2_composer.checkpoints.index import Index, best, superseded
from esm2_composer.checkpoints.names import updates
from esm2_composer.distributed.collectives import say
from esm2_composer.errors import ReportedError, TransientError, UserError
from esm2_composer.loggers import hand_on_all
from esm2_composer.recipe.schema import Recipe, batches

WAITS = (2, 4, 8, 16)  # seconds before trying to save again
WAITS_LEAVING = (2, 4, 8)  # within preemption.GRACE


class CheckpointSaver(Callback):
    """Saves every `interval` updates, at the end, and after an evaluation among the best; then deletes what is
    superseded.

    A save that fails is retried for half a minute, and then left to the next one: the previous checkpoint stays,
    and training continues.
    """

    def __init__(
        self, folder: Folder, interval: int, keep_newest: int, keep_best: int, index: Index | None = None
    ) -> None:
        self._folder = folder
        self._interval, self._keep_newest, self._keep_best = interval, keep_newest, keep_best
        self._index = index or Index()
        self._saved: int | None = None
        self._staging = folder.staging()
        self._clear_staging()  # of what a killed run left

    def _clear_staging(self) -> None:
        if not dist.get_local_rank():
            shutil.rmtree(self._staging, ignore_errors=True)

    def pin_data(self, shards: dict[str, str]) -> None:
        """Remember what the run is trained and validated on, or refuse to continue with other data.

        Raises:
            UserError: `shards`, digests of the splits' indices, are not those of the run so far.
        """
        for split, digest in shards.items():
            if self._index.shards.get(split, digest) != digest:
                raise UserError(
                    f"data.remote has other {split} shards than this run was trained on so far; restore those, or "
                    "start a new run, in another save_folder and without load_path"
                )
        self._index.shards = shards

    def lacks_evaluation(self, state: State, recipe: Recipe) -> bool:
        """Whether an evaluation is due now that was never finished: a run's first, or one that was cut short."""
        update = state.timestamp.batch.value
        due = update % batches(recipe.eval_interval) == 0 or update == recipe.updates
        return due and update not in self._index.losses

    def newest_before(self, update: int) -> str | None:
        """Where the newest checkpoint is that was saved after at most `update` updates; None if there is none."""
        try:
            names = ask(self._folder, self._folder.names)
        except ReportedError:  # the message this is for must be printed anyway
            return None
        names = [name for name in names if updates(name) <= update]
        return self._folder.location(names[-1]) if names else None

    def eval_end(self, state: State, logger: Logger) -> None:
        hand_on_all(state)  # once the index has this evaluation, no start repeats it
        update = state.timestamp.batch.value
        loss = float(state.eval_metric_values["loss"])
        if math.isfinite(loss):
            self._index.losses[update] = loss
            self._tidy()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        update = state.timestamp.batch.value
        last = state.timestamp >= state.max_duration
        if update % self._interval == 0 or last or self._is_among_the_best(update):
            self.save(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        if not self.save_once(state):
            update = state.timestamp.batch.value
            raise TransientError(f"the run has ended, but its last checkpoint, of update {update}, is not saved")

    def result(self) -> str:
        """What the run achieved, for people."""
        message, losses = f"checkpoints are in {self._folder}", self._index.losses
        if losses:
            low = min(losses, key=lambda update: losses[update])
            message += f"; validation perplexity was lowest after update {low:,}, {math.exp(losses[low]):.3f}"
        return message

    def _is_among_the_best(self, update: int) -> bool:
        losses = self._index.losses
        if update not in losses or not self._keep_best:
            return False
        return sum(loss < losses[update] for loss in losses.values()) < self._keep_best

    def save_once(self, state: State, waits: Sequence[int] = WAITS) -> bool:
        """Save a checkpoint, unless this update's is saved already; return whether it is."""
        return self._saved == state.timestamp.batch.value or self.save(state, waits=waits)

    def save(self, state: State, prefix: str = "", waits: Sequence[int] = WAITS) -> bool:
        """Save a checkpoint, to be resumed from unless its name gets a prefix; return whether that succeeded."""
        hand_on_all(state)
        update = state.timestamp.batch.value
        sharded = state.fsdp_sharded_state_dict_enabled
        staged = f"ep{state.timestamp.epoch.value}-ba{update}" + ("" if sharded else "-rank0.pt")
        for wait in (*waits, None):
            failure = self._try_to_save(state, self._staging / staged, prefix + staged)
            if failure is None:
                break
            then = "leaving it to the next one" if wait is None else f"trying again in {wait} s"
            say(f"checkpoint of update {update} not saved: {failure}; {then}")
            if wait is None:
                return False
            time.sleep(wait)
        self._saved = update
        self._tidy()
        return True

    def _try_to_save(self, state: State, staged: Path, name: str) -> str | None:
        """Save, or return why not. Every rank returns the same."""
        steps = [
            lambda: self._write(state),
            lambda: self._folder.send(staged, name, dist.get_global_rank()),
            lambda: dist.get_global_rank() or self._folder.commit(staged, name),
        ]
        if state.fsdp_sharded_state_dict_enabled:  # in torch, ranks would wait for one that cannot make the folder
            steps.insert(0, lambda: self._folder.begin(staged, name, dist.get_global_rank()))
        failure = next((f for step in steps if (f := self._everywhere(step)) is not None), None)
        self._clear_staging()
        dist.barrier()
        return failure

    def _write(self, state: State) -> None:
        try:
            save_checkpoint(state, str(self._staging / "ep{epoch}-ba{batch}-rank{rank}.pt"))
        except (Exception, CheckpointException) as error:  # the second, of sharded ones, is no Exception
            dist.barrier()  # the one at its end, where the ranks that did not fail are waiting
            cause = error
            if isinstance(error, CheckpointException):
                cause, _ = next(iter(error.failures.values()))
            if "inline_container" in str(cause):  # torch does not say why it cannot write
                free = shutil.disk_usage(self._staging).free
                cause = OSError(f"cannot be written; {free:,} bytes are free in {self._staging.parent}")
            if cause is error:
                raise
            raise cause from error

    def _everywhere(self, action: Callable[[], object]) -> str | None:
        """Run `action`, and return why the first rank failed, if one did."""
        try:
            action()
            failure = None
        except Exception as error:  # disks, file systems and stores each have their own
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
        return next((f for f in dist.all_gather_object(failure) if f is not None), None)

    def _tidy(self) -> None:
        """Delete superseded checkpoints, and write the index."""
        if dist.get_global_rank():
            return
        try:
            names = self._folder.names()
            for name in superseded(names, self._index.losses, self._keep_newest, self._keep_best):
                self._folder.remove(name)
                names.remove(name)
            self._index.write(self._folder, best(names, self._index.losses, self._keep_best))
        except Exception as error:  # not worth losing a run; the next save does it
            say(f"save_folder not tidied: {type(error).__name__}: {error}")
