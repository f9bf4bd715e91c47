"""Re-reading shards, as training would: are they what index.json says, and what do they hold?"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from esm2_composer.addresses import is_remote
from esm2_composer.conversion.layouts import open_parquet, reading
from esm2_composer.conversion.records import RESIDUES
from esm2_composer.data.mds import Shard, check_index
from esm2_composer.data.splits import SPLITS, swapped
from esm2_composer.errors import UserError
from esm2_composer.files import refuse_irregular, xxh64
from esm2_composer.progress import OnProgress
from esm2_composer.storage import Store
from esm2_composer.workers import Workers

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
MAX_LENGTH = 1024  # tokens, <cls> and <eos> included


def verify(
    uri: str, workers: int = 1, progress: OnProgress = lambda stage, done, total: None
) -> dict[str, dict[str, Any]]:
    """Check every shard below `uri`, a split or a folder of splits; returns each split's statistics by its name,
    and under "absent" what it should have been compared with, but lacks.

    Raises:
        UserError: a shard is missing, its hash or size is not the index's, a sample's lengths do not add up, it
            holds a letter that is no residue, index.json is no split's, the counts are not conversion.json's,
            cluster_ids.parquet names other clusters, or the split lies under the other's name.
    """
    uri = uri.rstrip("/")
    places = [(uri.rpartition("/")[2], uri), *((split, f"{uri}/{split}") for split in SPLITS)]
    found = {}
    for split, place in places:
        index = _read_json(place, "index.json")
        if index is not None:
            conversion = _read_json(place, "conversion.json")
            if mistake := swapped(place, split, conversion):
                raise UserError(mistake)
            of_split = partial(progress, f"shards of {split}")
            found[split] = _verify_split(place, index, conversion, workers, of_split)
    if not found:
        raise UserError(f"{uri}: no index.json there, nor in train/ or valid/: no finished shards")
    return found


@contextlib.contextmanager
def _fetched(place: str, name: str) -> Iterator[Path | None]:
    """A file of a split, fetched if need be; None if there is none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(place) / name
        if is_remote(place):
            store = Store(place, Path(folder))
            path = store.download(name, Path(folder)) if name in store.names(name) else Path(folder) / name
        refuse_irregular(path)
        yield path if path.exists() else None


def _read_json(place: str, name: str) -> dict[str, Any] | None:
    with _fetched(place, name) as path:
        if path is None:
            return None
        try:
            content = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}/{name}: damaged ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{place}/{name}: damaged (it holds no names and values)")
    return content


def _verify_split(
    place: str,
    index: dict[str, Any],
    conversion: dict[str, Any] | None,
    workers: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    _store.cache_clear()  # the endpoint may differ from the last call's
    shards = check_index(index, place)
    lengths, draws, clusters, ids = np.zeros(0), np.zeros(0), 0, 0
    check = partial(_check_shard, place)
    workers = min(workers, max(len(shards), 1))  # a process takes seconds to start; one shard needs none
    with Workers(workers) as pool:
        for number, counted in enumerate(pool.map(check, shards) if workers > 1 else map(check, shards), 1):
            lengths, draws = _add(lengths, counted[0]), _add(draws, counted[1])
            clusters, ids = clusters + counted[2], ids + counted[3]
            progress(number, len(shards))
    residues = int(lengths @ np.arange(len(lengths)))
    counts = {"clusters": clusters, "members": int(lengths.sum()), "residues": residues}
    for name, count in counts.items():
        expected = conversion.get(f"{name}_written", 0) if conversion else count
        if count != expected:
            raise UserError(
                f"{place}: {count:,} {name}, but conversion.json says {expected}; "
                "a shard is missing from index.json, or another split's"
            )
    if not clusters:
        raise UserError(f"{place}: its shards hold no cluster")
    with _fetched(place, "cluster_ids.parquet") as path:
        if path and _sum_of_hashes(_listed(place, path)) != ids % 2**64:
            raise UserError(f"{place}/cluster_ids.parquet: not the ids of the clusters in the shards")
        if path and conversion and conversion.get("cluster_ids_xxh64") != xxh64(path):
            raise UserError(f"{place}/cluster_ids.parquet: its xxh64 is not that of conversion.json")
    absent = [*["conversion.json"] * (not conversion), *["cluster_ids.parquet"] * (not path)]
    return {"shards": len(shards), **counts, "absent": absent, **_statistics(lengths, draws)}


def _listed(place: str, path: Path) -> Iterator[str | None]:
    with reading(f"{place}/{path.name}"), open_parquet(path) as ids:
        columns = {field.name: field.type for field in ids.schema_arrow}
        if columns.get("cluster_id") not in (pa.string(), pa.large_string()):
            raise UserError(f"{place}/{path.name}: damaged (no column cluster_id of strings)")
        for batch in ids.iter_batches(columns=["cluster_id"]):
            yield from batch["cluster_id"].to_pylist()


def _sum_of_hashes(ids: Iterable[str | None]) -> int:
    """Equal for the same ids in any order."""
    return sum(xxhash.xxh64_intdigest(name or "") for name in ids) % 2**64


def _check_shard(place: str, entry: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, int, int]:
    """How many members, and how many draws of a member from each cluster, have each length; clusters; their ids'
    hashes."""
    samples, raw = entry["samples"], entry["raw_data"]
    file = entry["zip_data"] or raw
    name = file["basename"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = _store(place).download(name, Path(folder)) if is_remote(place) else Path(place) / name
            refuse_irregular(path)
            packed = path.read_bytes()
        except OSError as error:
            raise UserError(f"{place}/{name}: cannot be read ({error})") from error
        try:
            _check_file(packed, file)
            content = _unpack(entry["compression"], packed, raw["bytes"])
            _check_file(content, raw)
        except ValueError as error:  # an unknown algorithm, or damage where there are no hashes
            raise UserError(f"{place}/{name}: {error}") from error
        shard = Shard(memoryview(content), f"{place}/{name}")
        if len(shard) != samples:
            raise UserError(f"{place}/{name}: {len(shard):,} samples, but index.json says {samples:,}")
        lengths, draws, ids = np.zeros(0), np.zeros(0), []
        for number in range(samples):
            sample = shard[number]
            ids.append(sample["cluster_id"])
            members = sample["lengths"]
            if bytes(sample["residues"]).translate(None, RESIDUES):
                raise UserError(f"{place}/{name}: {sample['cluster_id']} holds letters that are no residues")
            counts = np.bincount(members).astype(float)
            lengths, draws = _add(lengths, counts), _add(draws, counts / len(members))
    return lengths, draws, samples, _sum_of_hashes(ids)


def _unpack(compression: str | None, packed: bytes, size: int) -> bytes:
    """Raises ValueError if it cannot be. A few bytes of zstd may expand to gigabytes: only `size` are unpacked."""
    from streaming.base.compression import decompress

    if compression is None or not compression.startswith("zstd"):
        return decompress(compression, packed)
    try:
        return pa.decompress(packed, size, "zstd", asbytes=True)
    except OSError as error:
        raise ValueError(f"it does not unpack to the {size:,} bytes of index.json ({error})") from error


def _check_file(content: bytes, entry: dict[str, Any]) -> None:
    """Raises ValueError if its size or hash is not the one listed."""
    from streaming.base.hashing import get_hash

    if len(content) != entry["bytes"]:
        raise ValueError(f"it has {len(content):,} bytes, by index.json {entry['bytes']:,}; the shard is damaged")
    for algorithm, expected in entry["hashes"].items():
        if get_hash(algorithm, content) != expected:
            raise ValueError(f"its {algorithm} is not that of index.json; the shard is damaged")


@cache
def _store(place: str) -> Store:
    """The store of a split, one for all shards of a process: its client takes longer to make than to use."""
    with tempfile.TemporaryDirectory() as folder:  # to upload from, though nothing will be
        return Store(place, Path(folder))


def _add(counts: np.ndarray, more: np.ndarray) -> np.ndarray:
    """`counts` + `more`, whichever is longer."""
    total = np.zeros(max(len(counts), len(more)))
    total[: len(counts)] += counts
    total[: len(more)] += more
    return total


def _statistics(lengths: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
    """What lengths members have, all (`lengths`) and as training draws them, one of each cluster (`draws`)."""
    members = lengths.sum()
    ranks = [max(int(np.ceil(members * percent / 100)), 1) for percent in PERCENTILES]
    percentiles = np.searchsorted(np.cumsum(lengths), ranks)
    tokens = np.minimum(np.arange(len(lengths)) + 2, MAX_LENGTH)
    return {
        "length_percentiles": {f"{p} %": int(v) for p, v in zip(PERCENTILES, percentiles, strict=True)},
        "share_over_1022": float(lengths[MAX_LENGTH - 1 :].sum() / members),
        "padding_at_1024": float(1 - (draws * tokens).sum() / (draws.sum() * MAX_LENGTH)),
    }
