"""The MDS format: shards written byte for byte as Streaming's MDSWriter does, and read in place.

Importing Streaming imports torch: five seconds and 700 MiB in every worker of a conversion, more than all else it
does. Its reader opens the file again for every sample and copies all of it, every member of a cluster. The format
itself is small: a count, offsets, the columns as JSON, and the samples end to end.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
import zstd

from esm2_composer.errors import UserError
from esm2_composer.files import write_durably

COLUMNS = {"cluster_id": "str", "lengths": "ndarray:int32", "residues": "bytes"}  # of a cluster: see `records`
SHARD_BYTES = 64 * 2**20  # before compression; a sample that is larger makes a shard of its own
ZSTD_LEVEL = 1  # packs residues to 0.560 of their size; the default, level 3, to 0.563 in three times the time

_CONFIG = {
    "version": 2,
    "format": "mds",
    "compression": f"zstd:{ZSTD_LEVEL}",
    "hashes": ["xxh64"],
    "size_limit": SHARD_BYTES,
    "column_names": list(COLUMNS),
    "column_encodings": list(COLUMNS.values()),
    "column_sizes": [None] * len(COLUMNS),
}
assert list(COLUMNS) == sorted(COLUMNS), "MDS stores columns in the order of their names"
_CONFIG_BYTES = json.dumps(_CONFIG, sort_keys=True).encode()
_SHAPE_FORMATS = ("<BB", "<BH", "<BI")
_SHAPE_SIZES = tuple(map(struct.calcsize, _SHAPE_FORMATS))


def check_index(index: Any, place: str) -> list[dict[str, Any]]:
    """The entries of the shards in the index.json of the split at `place`, which may be acted upon.

    Files are fetched, unpacked and removed under the names that it gives: those must be a shard's, in the split's
    own folder, and no other entry's.

    Raises:
        UserError: one is not, a field is missing or of another type, or the shards are not of clusters.
    """
    shards = index.get("shards") if isinstance(index, dict) else None
    if not isinstance(shards, list):
        raise UserError(f"{place}/index.json: damaged (it lists no shards); make these shards anew")
    seen: set[str] = set()
    for number, entry in enumerate(shards):
        try:
            names = _check_entry(entry)
            if repeated := seen.intersection(names):
                raise ValueError(f"{min(repeated)} is listed before")
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            reason = f"entry {number} is not of an MDS shard: {error}"
            raise UserError(f"{place}/index.json: damaged ({reason}); make these shards anew") from error
        seen.update(names)
        columns = entry["column_names"], entry["column_encodings"]
        if columns != (list(COLUMNS), list(COLUMNS.values())):
            found = ", ".join(f"{name} ({encoding})" for name, encoding in zip(*columns, strict=False))
            raise UserError(f"{place}: not shards of clusters; their columns are {found}")
    return shards


def _check_entry(entry: dict[str, Any]) -> list[str]:
    """The names of a shard's files. For any other entry, raises a ValueError, TypeError, LookupError or
    AttributeError that says what is wrong."""
    for field, expected in (("version", 2), ("format", "mds")):
        if entry[field] != expected:
            raise ValueError(f"{field} {entry[field]!r}")
    for field, kind in (("samples", int), ("column_names", list), ("column_encodings", list)):
        if type(entry[field]) is not kind:
            raise TypeError(f"{field} {entry[field]!r}")
    raw, packed, compression = entry["raw_data"], entry["zip_data"], entry["compression"]
    if not re.fullmatch(r"shard\.[\w.-]+\.mds", raw["basename"], re.ASCII):
        raise ValueError(f"raw_data.basename {raw['basename']!r}")
    if (packed, compression) == (None, None):
        files = [raw]
    else:
        files = [raw, packed]
        if packed["basename"] != f"{raw['basename']}.{compression.partition(':')[0]}":
            raise ValueError(f"zip_data.basename {packed['basename']!r}, compression {compression!r}")
    for file in files:
        if type(file["bytes"]) is not int or not 0 <= file["bytes"] < 2**32:  # offsets in a shard have 32 bits
            raise ValueError(f"bytes {file['bytes']!r}")
        if type(file["hashes"]) is not dict:
            raise TypeError(f"hashes {file['hashes']!r}")
    if not 0 <= 4 * entry["samples"] < raw["bytes"]:  # each has an offset
        raise ValueError(f"samples {entry['samples']}")
    return [file["basename"] for file in files]


def encode_sample(sample: dict[str, Any]) -> bytes:
    """A sample as MDS stores it: the sizes of its columns, then the columns."""
    cluster_id, residues = sample["cluster_id"].encode(), sample["residues"]
    lengths = _encode_vector(sample["lengths"])
    sizes = struct.pack("<III", len(cluster_id), len(lengths), len(residues))
    return b"".join((sizes, cluster_id, lengths, residues))


def _encode_vector(values: np.ndarray) -> bytes:
    """One dimension and the type of its size in a byte, the size, the values."""
    code = (len(values) >= 2**8) + (len(values) >= 2**16)
    return struct.pack(_SHAPE_FORMATS[code], 1 << 2 | code, len(values)) + values.tobytes()


class Shard:
    """The samples of an unpacked shard, read where they lie."""

    def __init__(self, content: memoryview, name: object) -> None:
        self._bytes, self._name = content, name

    @classmethod
    def mapped(cls, path: Path) -> Shard:
        """A file mapped into memory: to read a sample takes no system call. The mapping outlives the open file
        (Python's own mmap keeps a descriptor for each, and a run may read thousands of shards)."""
        with pa.memory_map(str(path)) as file:
            return cls(memoryview(file.read_buffer()), path)

    def xxh64(self) -> str:
        return xxhash.xxh64(self._bytes).hexdigest()

    def __len__(self) -> int:
        return int.from_bytes(self._bytes[:4], "little")

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Sample `number`: as `records` makes it, but its residues are a memoryview.

        Raises:
            UserError: there is no such sample, or its lengths are not those of its residues.
        """
        try:
            start, end = struct.unpack_from("<II", self._bytes, 4 * (1 + number))
            id_size, lengths_size, _ = struct.unpack_from("<III", self._bytes, start)
            lengths_at = start + 12 + id_size
            residues_at = lengths_at + lengths_size
            cluster_id = str(self._bytes[start + 12 : lengths_at], "utf-8")
            lengths = _decode_vector(self._bytes[lengths_at:residues_at])
            residues = self._bytes[residues_at:end]
            # Most clusters have a few members, for which numpy takes longer.
            each = lengths if len(lengths) > 64 else lengths.tolist()
            least, total = (each.min(), each.sum()) if each is lengths else (min(each), sum(each))
            if least < 1 or total != len(residues):
                raise ValueError(f"lengths of {cluster_id} do not add up to its residues")
        except (struct.error, IndexError, ValueError) as error:
            raise UserError(
                f"{self._name}: sample {number} is damaged ({error}); make these shards anew"
            ) from error
        return {"cluster_id": cluster_id, "lengths": lengths, "residues": residues}


def _decode_vector(encoded: memoryview) -> np.ndarray:
    return np.frombuffer(encoded, "<i4", offset=_SHAPE_SIZES[encoded[0] & 3])


class ShardWriter:
    """Writes samples into `folder`, as `shard.PREFIX.00.mds.zstd` and so on."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self._folder, self._prefix = folder, prefix
        self._shards: list[dict[str, Any]] = []
        self._start_shard()

    def _start_shard(self) -> None:
        self._samples: list[bytes] = []
        self._bytes = 8 + len(_CONFIG_BYTES)

    def write(self, sample: dict[str, Any]) -> None:
        encoded = encode_sample(sample)
        if self._samples and self._bytes + len(encoded) + 4 > SHARD_BYTES:
            self._write_shard()
        self._samples.append(encoded)
        self._bytes += len(encoded) + 4

    def finish(self) -> list[dict[str, Any]]:
        """Write what is left; entries for `shards` of index.json."""
        if self._samples:
            self._write_shard()
        return self._shards

    def _write_shard(self) -> None:
        count = len(self._samples)
        offsets = np.cumsum([0, *map(len, self._samples)]) + 4 + 4 * (count + 1) + len(_CONFIG_BYTES)
        head = (np.uint32(count).tobytes(), offsets.astype(np.uint32).tobytes(), _CONFIG_BYTES)
        raw = b"".join((*head, *self._samples))
        self._start_shard()
        packed = zstd.compress(raw, ZSTD_LEVEL)
        name = f"shard.{self._prefix}.{len(self._shards):02}.mds"
        write_durably(self._folder / f"{name}.zstd", packed)
        entry = {"samples": count, "raw_data": _file(name, raw), "zip_data": _file(f"{name}.zstd", packed)}
        self._shards.append({**entry, **_CONFIG})


def _file(basename: str, content: bytes) -> dict[str, Any]:
    return {"basename": basename, "bytes": len(content), "hashes": {"xxh64": xxhash.xxh64(content).hexdigest()}}
