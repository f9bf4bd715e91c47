"""Raw data in each layout, and what shards hold."""

from __future__ import annotations

import contextlib
import hashlib
import random
import sqlite3
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from streaming import StreamingDataset

from esm2_composer.conversion.layouts import BioNeMo, Flat

SPLIT_FILES = {
    "train": ("train_clusters.parquet", "train.db"),
    "valid": ("valid_clusters.parquet", "validation.db"),
}
# Every kind of bad sequence.
MESS = {
    "lower": "mkv",
    "stop": "MKV*",
    "stop inside": "MK*V",
    "gap": "MK-V",
    "dot": "MK.V",
    "digit": "MK1V",
    "non-ASCII": "MKÉV",
    "J": "MJ",
    "rare": "MUOBZX",
    "white space": " M K\tV\n",
    "windows": "MK\r\nV\r\n",
    "empty": "",
    "null": None,
    "long": "M" * 35_000,
}


def write_clusters(path: Path, columns: dict[str, Any], row_group_size: int | None = None) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def write_proteins(path: Path, proteins: dict[str, str | None]) -> Path:
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE protein (id TEXT PRIMARY KEY, sequence TEXT)")
        database.executemany("INSERT INTO protein VALUES (?, ?)", proteins.items())
    return path


def write_layout(folder: Path, columns: dict[str, Any], proteins: dict[str, str | None]) -> tuple[Path, Path]:
    """Write clusters.parquet and proteins.db; returns their paths."""
    return write_clusters(folder / "clusters.parquet", columns), write_proteins(folder / "proteins.db", proteins)


def bionemo(folder: Path, columns: dict[str, Any], proteins: dict[str, str | None]) -> BioNeMo:
    folder.mkdir(parents=True, exist_ok=True)
    return BioNeMo(*write_layout(folder, columns, proteins))


def two_clusters(folder: Path, sequence: str = "MK") -> BioNeMo:
    return bionemo(folder, {"ur50_id": ["a", "b"]}, {"a": "MKV", "b": sequence})


def flat(path: Path, rows: list[tuple[str | None, str | None, str | None]]) -> Flat:
    columns = dict(zip(Flat.columns, zip(*rows, strict=True), strict=True))
    return Flat(write_clusters(path, {name: pa.array(values, pa.string()) for name, values in columns.items()}))


def random_data(clusters: int, seed: int = 0) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Members of each cluster, and their sequences."""
    rng = random.Random(seed)
    named = {
        f"c{number}": [f"m{number}_{i}" for i in range(rng.choice([1, 1, 2, 5]))] for number in range(clusters)
    }
    letters = "ACDEFGHIKLMNPQRSTVWYXBUZO"
    proteins = {
        name: "".join(rng.choices(letters, k=rng.randint(1, 60))) for ids in named.values() for name in ids
    }
    return named, proteins


def read_split(split: Path) -> list[dict[str, Any]]:
    dataset = StreamingDataset(local=str(split), batch_size=1, validate_hash="xxh64")
    return [dataset[index] for index in range(len(dataset))]


def members_of(records: list[dict[str, Any]]) -> dict[str, list[bytes]]:
    found = {}
    for record in records:
        ends = record["lengths"].cumsum()
        found[record["cluster_id"]] = [
            record["residues"][e - n : e] for e, n in zip(ends, record["lengths"], strict=True)
        ]
    return found


def in_order(clusters: dict[str, list[bytes]]) -> list[tuple[str, list[bytes]]]:
    """By the MD5 of the cluster's id, as docs/data.md says."""
    return sorted(
        clusters.items(), key=lambda item: int.from_bytes(hashlib.md5(item[0].encode()).digest(), "little")
    )


def hashes(split: Path) -> dict[str, str]:
    """Of the files of a split, without conversion.json, which tells the time, and what reading it unpacked."""
    files = [split / "index.json", split / "cluster_ids.parquet", *split.glob("*.zstd")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)
