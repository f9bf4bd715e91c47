"""What Streaming 0.13 lacks in reading shards: speed, and a way on from a damaged file."""

from __future__ import annotations

import os
from bisect import bisect_right
from pathlib import Path
from time import time_ns
from typing import Any

import numpy as np
from streaming import Stream, StreamingDataset
from streaming.base.constant import EPOCH_DATA
from streaming.base.dataset import _ShardState
from streaming.base.format import Reader
from streaming.base.shared import SharedMemory, _get_path

from esm2_composer.epochs import WHOLE_BATCHES
from esm2_composer.errors import UserError
from esm2_composer.mds import Shard


class MappedDataset(StreamingDataset):
    """A StreamingDataset of one stream of clusters that keeps the shards it reads mapped into memory.

    Streaming opens a shard's file for every sample, and a thread of its takes a lock of the whole node for every
    sample, to learn that the shard is there. A mapped one is, so neither is needed. Under a cache limit shards are
    not kept: a file that is mapped would hold its place on the disk after it has been evicted.
    """

    def __init__(self, stream: Stream, **arguments: Any) -> None:
        super().__init__(streams=[stream], **arguments)
        self.batching_method = WHOLE_BATCHES
        self.spanner = ShardBounds(self.samples_per_shard)
        self._mapped: dict[int, Shard] = {}

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        if shard_id in self._mapped:
            return
        try:
            super().prepare_shard(shard_id, blocking)
        except BaseException:
            # Streaming leaves it as being prepared, and other workers would wait for that without end.
            self._shard_states[shard_id] = _ShardState.LOCAL
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
        path = Path(stream.local, stream.split, self.shards[shard_id].raw_data.basename)
        for _ in range(1 + retry):
            try:
                shard = Shard.mapped(path)
            except FileNotFoundError:  # not there yet, or evicted again
                self.prepare_shard(shard_id)
                continue
            if self.cache_limit:
                self._shard_access_times[shard_id] = time_ns()
            else:
                self._mapped[shard_id] = shard
            return shard
        why = "; data.cache_limit is too low" if self.cache_limit else ""
        raise UserError(f"{path}: gone as soon as it is there{why}")

    def _share_work(self, sample_ids: np.ndarray) -> tuple[SharedMemory, SharedMemory | None]:
        """Streaming's, without the copy it makes of an epoch on the way into shared memory."""
        shape, data = super()._share_work(sample_ids[..., :0])  # so it has the block for the shape only
        np.ndarray(5, np.int64, shape.buf)[:] = sample_ids.shape
        if sample_ids.size:
            name = _get_path(self._shm_prefix_int, EPOCH_DATA)
            data = SharedMemory(name, create=True, size=8 * sample_ids.size, auto_cleanup=False)
            np.ndarray(sample_ids.shape, np.int64, data.buf)[...] = sample_ids
        return shape, data


class ShardBounds:
    """Streaming's `Spanner`, in a tenth of its time: global sample number -> (shard, number within it)."""

    def __init__(self, samples_per_shard: np.ndarray) -> None:
        self._starts = [0, *np.cumsum(samples_per_shard).tolist()]

    def __getitem__(self, sample_id: int) -> tuple[int, int]:
        shard = bisect_right(self._starts, sample_id) - 1
        return shard, int(sample_id) - self._starts[shard]


class CheckedStream(Stream):
    """A stream that fetches a damaged shard again, once, and then says which it is.

    Streaming checks a shard's hash as it unpacks it, and on damage its thread dies and the epoch just ends; a file
    in the cache that a crash cut short it takes as it is.
    """

    failure: UserError | None = None  # for the iterating thread to raise

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: np.ndarray) -> None:
        for shard in shards:
            for path, size in self._files(shard):
                if path.exists() and path.stat().st_size != size:
                    self._drop(path, f"{path.stat().st_size} bytes instead of {size}")
        super().set_up_local(shards, cache_usage_per_shard)

    def prepare_shard(self, shard: Reader) -> int:
        try:
            return super().prepare_shard(shard)
        except Exception as first:  # zstd, the hash and each store raise their own types
            for path, _ in self._files(shard):
                if path.exists():
                    self._drop(path, str(first))
            try:
                return super().prepare_shard(shard)
            except Exception as second:
                name = (shard.file_pairs[0][1] or shard.file_pairs[0][0]).basename
                place = f"{self.remote or self.local}/{name}"
                self.failure = UserError(f"{place}: cannot be read ({second})")
                raise self.failure from second

    def _files(self, shard: Reader) -> list[tuple[Path, int]]:
        """The shard's files in the cache, unpacked and packed, and the bytes they should have."""
        folder = Path(self.local, self.split)
        return [(folder / info.basename, info.bytes) for pair in shard.file_pairs for info in pair if info]

    def _drop(self, path: Path, why: str) -> None:
        if self.remote is None:
            self.failure = UserError(f"{path}: damaged ({why}), and there is no copy to fetch")
            raise self.failure
        os.remove(path)
