"""Reading shards, where Streaming 0.13 falls short: speed, low memory use, datasets opened at the same time."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
import traceback
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import streaming.base.dataset
import torch.distributed as dist
from streaming import Stream, StreamingDataset
from streaming.base.constant import BARRIER_FILELOCK, EPOCH_DATA
from streaming.base.dataset import _ShardState
from streaming.base.shared import SharedMemory, _get_path, get_shm_prefix

from esm2_composer.data.checks import SHARED_MEMORY
from esm2_composer.data.epochs import lay_out_epoch, layout_shape
from esm2_composer.data.mds import Shard
from esm2_composer.data.streams import HASH
from esm2_composer.errors import ReportedError, UserError, system_error
from esm2_composer.files import try_lock

OPENING_SECONDS = 60


@contextlib.contextmanager
def opening_alone() -> Iterator[None]:
    """For all ranks of a node: while they open a dataset, none of this user's other runs there does.

    Streaming looks for a free name in shared memory, and then takes it: two runs may find the same one. A node's
    first rank holds the lock. The wait for it is bounded, since runs on the same nodes could each hold the
    other's.
    """
    with contextlib.ExitStack() as stack:
        if not int(os.environ.get("LOCAL_RANK", 0)):
            path = SHARED_MEMORY / f"esm2_composer-{os.getuid()}.lock"  # runs may have a TMPDIR each
            lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
            stack.callback(os.close, lock)
            deadline = time.monotonic() + OPENING_SECONDS
            while not try_lock(lock) and time.monotonic() < deadline:
                time.sleep(0.05)
        if dist.is_initialized():
            dist.barrier()
        yield


class MappedDataset(StreamingDataset):
    """A StreamingDataset of one stream of clusters that keeps the shards it reads mapped into memory.

    For every sample Streaming opens the shard's file, and a thread takes a node-wide lock to learn whether the
    shard is there. A mapped shard is, so neither is needed. Under a cache limit shards are not kept: a mapped file
    would still take up disk space after its eviction.
    """

    failure: ReportedError | None = None  # of a thread, for the iterating one to raise

    def __init__(self, stream: Stream, **arguments: Any) -> None:
        super().__init__(streams=[stream], **arguments)
        self._mapped: dict[int, Shard] = {}
        self._intact: set[int] = set()

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        if shard_id in self._mapped:
            return
        try:
            super().prepare_shard(shard_id, blocking)
        except BaseException as error:
            # Streaming leaves it marked as being prepared, and other workers would wait forever.
            self._shard_states[shard_id] = _ShardState.LOCAL
            if isinstance(error, PermissionError):
                place = error.filename or self.streams[0].local
                raise system_error(f"{place}: {error.strerror or error}", error) from error
            raise

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """A cluster as `records` makes it, but its residues are a memoryview."""
        shard_id, number = self.spanner[sample_id]
        shard = self._mapped.get(shard_id)
        if shard is None:
            shard = self._map(shard_id, retry)
        return shard[number]

    def _map(self, shard_id: int, retry: int) -> Shard:
        (stream,) = self.streams
        file = self.shards[shard_id].raw_data
        path = Path(stream.local, stream.split, file.basename)
        for _ in range(1 + retry):
            try:
                shard = Shard.mapped(path)
            except FileNotFoundError:  # not there yet, or evicted again
                self.prepare_shard(shard_id)
                continue
            except OSError as error:  # another user's, perhaps
                why = os.strerror(error.errno) if error.errno else error
                raise system_error(f"{path}: cannot be read ({why})", error) from error
            if shard_id not in self._intact:  # Streaming checks what it unpacks, but not what it finds unpacked
                if HASH in file.hashes and shard.xxh64() != file.hashes[HASH]:
                    stream.drop(self.shards[shard_id], path, "its hash is not that of index.json")
                    continue
                if len(shard) != len(self.shards[shard_id]):
                    counts = f"{len(shard):,} samples, but index.json says {len(self.shards[shard_id]):,}"
                    raise UserError(f"{path}: {counts}; make these shards anew")
                self._intact.add(shard_id)
            if self.cache_limit:
                self._shard_access_times[shard_id] = time.time_ns()
            else:
                self._mapped[shard_id] = shard
            return shard
        why = "evicted again; data.cache_limit is too low" if self.cache_limit else "removed again"
        raise UserError(f"{path}: before it could be read, it was {why}")

    def on_exception(self, future: Future) -> None:
        """Streaming raises this in a thread that nobody joins, and the iterating thread would wait forever. Here
        that thread is woken, and raises it."""
        if error := future.exception():
            if isinstance(error, ReportedError):
                self.failure = error
            else:
                traceback.print_exception(error)
            self._event.set()
            self._iterator.on_exit()

    def _get_work(self, epoch: int, samples_done: int) -> np.ndarray:
        """This worker's samples of the epoch, int32, in the order in which it reads them.

        Streaming gives each worker a copy of its part, 8 bytes per sample. Here the workers of a node read one
        order in place, 4 bytes per sample, in an unlinked file, freed with the last of them.

        Raises:
            UserError: there is no room for it.
        """
        leader = self._unique_worker_world.is_local_leader
        wait_for_all = partial(self._shared_barrier, self._unique_worker_world.workers_per_node)
        if hasattr(self, "_iterator"):
            self._iterator.sample_ids = None  # Streaming keeps all its iterators
        wait_for_all()  # the previous epoch has made room, and the next one's number is set
        world = self._parallel_worker_world
        shape = layout_shape(self, world, samples_done)
        if not all(shape):  # resumed at the epoch's end
            return np.empty(0, np.int32)
        path = SHARED_MEMORY / _get_path(self._shm_prefix_int, EPOCH_DATA)
        if leader:
            reserve(path, shape)
        wait_for_all()
        try:
            order = np.memmap(path, np.int32, "r+" if leader else "r", shape=shape)
        except FileNotFoundError:
            needed = math.ceil(4 * math.prod(shape) / 2**20)
            raise UserError(
                f"{SHARED_MEMORY} has no room for the order of an epoch, {needed} MiB (docs/running.md)"
            ) from None
        wait_for_all()
        if leader:
            path.unlink()
            lay_out_epoch(self, world, epoch, samples_done, order)
        wait_for_all()
        return np.asarray(order)[world.rank_of_node, world.worker_of_rank].reshape(-1)


def reserve(path: Path, shape: tuple[int, ...]) -> None:
    """Make a file of int32 of this shape, or none if there is no room for it.

    Its zeros are written to reserve the space: without space, writing into a mapped file is a bus error.
    """
    path.unlink(missing_ok=True)  # of a run that was killed
    try:
        with path.open("xb") as file:
            np.zeros(shape, np.int32).tofile(file)
    except OSError:
        path.unlink(missing_ok=True)


class ShardBounds:
    """Streaming's `Spanner`, global sample number -> (shard, number within it), in a tenth of its time and without
    the 8 bytes per sample that each rank needs to build one."""

    def __init__(self, samples_per_shard: np.ndarray) -> None:
        self._starts = [0, *np.cumsum(samples_per_shard).tolist()]

    def __getitem__(self, sample_id: int) -> tuple[int, int]:
        if not 0 <= sample_id < self._starts[-1]:
            raise IndexError(f"sample {sample_id} of {self._starts[-1]}")
        shard = bisect_right(self._starts, sample_id) - 1
        return shard, int(sample_id) - self._starts[shard]


streaming.base.dataset.Spanner = ShardBounds  # its name in StreamingDataset's constructor


def claim_name(*arguments: Any) -> tuple[int, SharedMemory]:
    """Streaming's `get_shm_prefix`: a dataset's name in shared memory, marked at once by the lock's file.

    Streaming makes that file when the dataset is first iterated. A run killed before then (a resumed one before it
    reads validation) would leave what looks like a live run on the same cache.
    """
    prefix, memory = get_shm_prefix(*arguments)
    Path(tempfile.gettempdir(), _get_path(prefix, BARRIER_FILELOCK)).touch()
    return prefix, memory


streaming.base.dataset.get_shm_prefix = claim_name  # its name in StreamingDataset's constructor
