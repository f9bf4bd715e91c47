"""Fetching and unpacking shards, where Streaming 0.13 falls short: a store that is away, damage, a full disk."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zstd
from streaming import Stream
from streaming.base.format import Reader, get_index_basename
from streaming.base.world import World

from esm2_composer.data.mds import check_index
from esm2_composer.errors import FULL, TransientError, UserError
from esm2_composer.retry import retry

HASH = "xxh64"


class CheckedStream(Stream):
    """A stream that waits for a store to come back, and fetches a damaged shard again, once.

    Streaming gives a store one second, and checks a shard's hash as it unpacks it, but on damage its thread dies
    and the epoch just ends; a file in the cache that a crash cut short it takes as it is.
    """

    def __init__(self, remote: str | None, local: str) -> None:
        super().__init__(remote=remote, local=local, validate_hash=HASH, download_retry=1)
        self._dropped: set[Path] = set()

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        shards = super().get_shards(world, allow_unsafe_types)
        index = Path(self.local, self.split, get_index_basename())
        check_index(json.loads(index.read_text()), self.remote or self.local)
        return shards

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: np.ndarray) -> None:
        for shard in shards:
            *_, packed = self._files(shard)
            if self.remote is None and not packed.exists():  # Streaming would remove what was unpacked from it
                raise UserError(f"{packed}: not there")
            for path, size in self._files(shard).items():
                if path.exists() and path.stat().st_size != size:
                    self.drop(shard, path, f"{path.stat().st_size} bytes instead of {size}")
        super().set_up_local(shards, cache_usage_per_shard)

    def prepare_shard(self, shard: Reader) -> int:
        try:
            return super().prepare_shard(shard)
        except FileNotFoundError as error:
            if error.filename2 is None:  # else another run has unpacked it at the same time
                raise UserError(f"{self._source(shard)}: not there ({error})") from error
        except (ValueError, zstd.Error) as error:
            if "Checksum failure" not in str(error):
                raise UserError(f"{self._source(shard)}: cannot be read ({error})") from error
            *_, packed = self._files(shard)
            self.drop(shard, packed, str(error))
        try:
            return super().prepare_shard(shard)
        except (ValueError, zstd.Error) as error:
            raise UserError(f"{self._source(shard)}: cannot be read ({error})") from error

    def drop(self, shard: Reader, damaged: Path, why: str) -> None:
        """Remove a damaged file of a shard, to be fetched or unpacked again.

        Raises:
            UserError: there is no copy, or it has been dropped before.
        """
        *_, packed = self._files(shard)
        if self.remote is None and damaged == packed:
            raise UserError(f"{damaged}: damaged ({why}), and there is no copy to fetch")
        if damaged in self._dropped:
            raise UserError(f"{self._source(shard)}: cannot be read ({why})")
        self._dropped.add(damaged)
        damaged.unlink(missing_ok=True)  # another process may have been faster

    def _source(self, shard: Reader) -> str:
        *_, packed = self._files(shard)
        return f"{self.remote or self.local}/{packed.name}"

    def _files(self, shard: Reader) -> dict[Path, int]:
        """The shard's files in the cache, unpacked and then (if it is compressed) packed, and the bytes they
        should have."""
        folder = Path(self.local, self.split)
        return {folder / info.basename: info.bytes for pair in shard.file_pairs for info in pair if info}

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        download = super()._download_file

        def fetch() -> str:
            with self._naming_full_disk():  # or the store would be blamed
                return download(from_basename, to_basename)

        return retry(fetch, f"{self.remote}/{from_basename}")

    def _decompress_shard_part(self, *arguments: Any) -> None:
        with self._naming_full_disk():
            super()._decompress_shard_part(*arguments)

    @contextlib.contextmanager
    def _naming_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise TransientError(
                f"{self.local}: no room for shards ({error.strerror}); make room there, set data.cache_limit, or "
                "take a data.local on a larger disk"
            ) from error
