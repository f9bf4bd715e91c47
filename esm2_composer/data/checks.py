"""Checks before shards are opened, for mistakes that Streaming would miss, or blame on something else."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection
from functools import partial
from pathlib import Path

from streaming.base.storage.download import CloudDownloader

from esm2_composer.addresses import is_remote
from esm2_composer.conversion.records import LONGEST_COUNTED
from esm2_composer.data.splits import SPLITS, count_clusters, swapped
from esm2_composer.errors import StoreUnavailable, UserError, system_error, tell
from esm2_composer.recipe.schema import DataSection
from esm2_composer.retry import retry

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_MEMORY = 256 * 2**10  # bytes, of a rank's semaphores; batches need more
# Bytes: Linux allows a socket's path 107, and Python appends these.
LONGEST_TMPDIR = 107 - len("/pymp-12345678/listener-12345678")


def check_places_of_workers(data: DataSection) -> None:
    """Raise a UserError if loader processes could not start, or not hand over batches: their rank would wait
    forever. Tell of a TMPDIR that Python does without."""
    folder, wanted = tempfile.gettempdir(), os.environ.get("TMPDIR")
    if wanted and os.path.abspath(wanted) != os.path.abspath(folder) and not int(os.environ.get("LOCAL_RANK", 0)):
        tell(f"TMPDIR {wanted} cannot be written; taking {folder}")
    room = shutil.disk_usage(SHARED_MEMORY) if data.num_workers and SHARED_MEMORY.is_dir() else None
    if room and room.total and room.free < LEAST_SHARED_MEMORY:  # without a limit, the total is 0
        raise UserError(
            f"{SHARED_MEMORY} is full, and loader processes need some of it; remove what is left there, make it "
            "larger (docker run --shm-size), or set data.num_workers=0"
        )
    if data.num_workers and len(os.fsencode(folder)) > LONGEST_TMPDIR:
        raise UserError(
            f"TMPDIR {folder} is too long for the sockets of loader processes; "
            f"set one of at most {LONGEST_TMPDIR} bytes, or data.num_workers=0"
        )


def make_cache(data: DataSection) -> None:
    """Raise a UserError, or TransientError, if `data.local` cannot be made: Streaming would blame the shards."""
    if data.local is not None:
        try:
            Path(data.local).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise system_error(f"data.local {data.local} cannot be made ({error.strerror})", error) from error


def check_shards(data: DataSection, global_batch_size: int) -> None:
    """Raise what `check_store` and `check_cache` do."""
    if is_remote(data.remote):
        check_store(data, global_batch_size)
    check_cache(data)


def check_cache(data: DataSection, splits: Collection[str] = SPLITS) -> None:
    """Check that `data.local` holds no other shards than `data.remote`: Streaming trusts an index that it finds.

    Raises:
        UserError: it does, or the remote has none.
        StoreUnavailable: the store does not answer.
    """
    for name in splits:
        remote, local = data.split(name)
        cached = Path(local, "index.json")
        if remote is None or not cached.exists():
            continue
        if _fetch_index(remote) != cached.read_bytes():
            raise UserError(
                f"data.local {data.local} holds other {name} shards than data.remote {data.remote}; "
                "take another data.local"
            )


def check_store(data: DataSection, global_batch_size: int) -> None:
    """Look at the splits in a store, as `config` does at those in a folder.

    Raises:
        UserError: a split is absent, is in the other's place, or has too few clusters for a global batch.
        StoreUnavailable: the store does not answer.
    """
    for name in SPLITS:
        remote, _ = data.split(name)
        assert remote is not None, data
        clusters = count_clusters(_fetch_index(remote))
        if not clusters:
            raise UserError(f"{remote}/index.json is no index of MDS shards")
        if name == "train" and clusters < global_batch_size:
            raise UserError(too_few(remote, clusters, global_batch_size))
        if mistake := swapped(remote, name, _fetch_conversion(remote)):
            raise UserError(mistake)


def too_few(place: str, clusters: int, global_batch_size: int) -> str:
    return f"{place} holds {clusters} clusters, fewer than one global_train_batch_size of {global_batch_size}"


def _fetch_index(remote: str) -> bytes:
    """Raises UserError if there is none, StoreUnavailable if the store does not answer for half a minute."""
    try:
        return retry(partial(_fetch, remote, "index.json"), f"{remote}/index.json")
    except StoreUnavailable:
        raise
    except Exception as error:  # each store raises its own types
        raise UserError(f"{remote}: cannot be opened as MDS shards ({error})") from error


def _fetch_conversion(place: str) -> object:
    """The conversion.json of a split, at a folder or URI; None if it cannot be fetched."""
    try:
        return json.loads(_fetch(place, "conversion.json"))
    except Exception:  # no such file, or other content; each store raises its own types
        return None


def _fetch(place: str, name: str) -> bytes:
    """A small file of a split, from its folder or URI."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        CloudDownloader.get(place).download(f"{place}/{name}", str(path), 60)
        return path.read_bytes()


def count_short_clusters(place: str, min_length: int) -> int | None:
    """How many clusters of a split have no member of `min_length` residues; None if its conversion does not say.

    Args:
        place: folder or URI of the split.
    """
    if min_length > LONGEST_COUNTED:  # longer ones are counted as this long
        return None
    try:
        longest = _fetch_conversion(place)["longest_members"]
        return sum(count for length, count in longest.items() if int(length) < min_length)
    except (LookupError, TypeError, ValueError, AttributeError):
        return None
