"""Raw UniRef layouts -> cluster records -> MDS shards.

One record is one cluster: its id, the lengths of its members, and their residues end to end. What is left out
or changed on the way is counted by reason, with examples; nothing goes silently.

The rules for a sequence: white space is removed, letters are made upper-case, a final `*` (stop) is dropped, J
(leucine or isoleucine, no token of ESM-2) becomes X (any). What then holds anything but the 20 amino acids and
X, B, U, Z, O, or nothing at all, is rejected.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from streaming import MDSWriter

from esm2_composer.errors import UserError

COLUMNS = {"cluster_id": "str", "lengths": "ndarray:int32", "residues": "bytes"}
SHARD_BYTES = 64 * 2**20
EXAMPLES_KEPT = 20
LENGTH_EDGES = (1, 51, 101, 201, 301, 401, 501, 751, 1023, 1501, 2001, 5001)

RESIDUES = b"ACDEFGHIKLMNPQRSTVWYXBUZO"
_TO_UPPER = bytes.maketrans(b"abcdefghijklmnopqrstuvwxyz", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_WHITE_SPACE = b" \t\r\n\v\f"

# A cluster as it comes: its id, and (member id, sequence or None if there is none) of each member.
RawCluster = tuple[str, list[tuple[str, bytes | None]]]


def clean(raw: bytes) -> tuple[bytes, list[str]]:
    """(residues, what was changed), by the rules above.

    Raises ValueError with the reason if the sequence must be rejected.
    """
    changes = []
    packed = raw.translate(None, _WHITE_SPACE)
    if packed != raw:
        changes.append("white space removed")
    residues = packed.translate(_TO_UPPER)
    if residues != packed:
        changes.append("lower case made upper")
    if residues.endswith(b"*"):
        residues = residues[:-1]
        changes.append("final * dropped")
    if b"J" in residues:
        residues = residues.replace(b"J", b"X")
        changes.append("J made X")
    if not residues:
        raise ValueError("empty sequence")
    if residues.translate(None, RESIDUES):
        raise ValueError("bad residue")
    return residues, changes


@dataclass
class Report:
    """What a conversion read, wrote, changed and rejected."""

    counts: Counter = field(default_factory=Counter)
    changed: Counter = field(default_factory=Counter)
    rejected: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    length_histogram: np.ndarray = field(default_factory=lambda: np.zeros(len(LENGTH_EDGES), np.int64))

    def reject(self, reason: str, name: str) -> None:
        self.rejected[reason] += 1
        kept = self.examples.setdefault(reason, [])
        if len(kept) < EXAMPLES_KEPT:
            kept.append(name)

    @property
    def rejected_fraction(self) -> float:
        """Rejected members as a share of all members named."""
        read = self.counts["members_read"]
        return (read - self.counts["members_written"]) / read if read else 0.0

    def as_dict(self) -> dict[str, Any]:
        labels = [f"{low}-{high - 1}" for low, high in pairwise(LENGTH_EDGES)] + [f"{LENGTH_EDGES[-1]}-"]
        return {
            **self.counts,
            "changed": dict(self.changed),
            "rejected": {
                reason: {"count": count, "examples": self.examples[reason]}
                for reason, count in self.rejected.items()
            },
            "member_lengths": dict(zip(labels, self.length_histogram.tolist(), strict=True)),
        }


def build_record(cluster: RawCluster, report: Report) -> dict[str, Any] | None:
    """The MDS sample of a cluster, or None if no member is left; `report` learns of everything."""
    cluster_id, members = cluster
    report.counts["clusters_read"] += 1
    report.counts["members_read"] += len(members)
    kept = []
    for member_id, raw in members:
        try:
            if raw is None:
                raise ValueError("member without sequence")
            if not isinstance(raw, bytes):
                raise ValueError("sequence is not text")
            residues, changes = clean(raw)
        except ValueError as reason:
            report.reject(str(reason), member_id)
            continue
        report.changed.update(changes)
        kept.append(residues)
    if not kept:
        report.reject("cluster with no usable member" if members else "cluster without members", cluster_id)
        return None
    lengths = np.array([len(residues) for residues in kept], dtype=np.int32)
    report.counts["clusters_written"] += 1
    report.counts["members_written"] += len(kept)
    report.counts["residues_written"] += int(lengths.sum())
    report.length_histogram += np.bincount(np.digitize(lengths, LENGTH_EDGES) - 1, minlength=len(LENGTH_EDGES))
    return {"cluster_id": cluster_id, "lengths": lengths, "residues": b"".join(kept)}


class BioNeMo:
    """Clusters of the BioNeMo layout: a parquet of clusters and an SQLite file of sequences.

    Training clusters have a column `ur90_id`, list of member ids, and may have `ur50_id`; validation clusters
    have `ur50_id` alone, the id of their only sequence.
    """

    def __init__(self, clusters: Path, sequences: Path) -> None:
        """Raises UserError if a file is missing or not what it should be."""
        self._clusters_path, self._sequences_path = clusters, sequences
        self._clusters = _open_parquet(clusters)
        self._sequences = _open_proteins(sequences)
        schema = self._clusters.schema_arrow
        self._columns = [name for name in schema.names if name in ("ur50_id", "ur90_id")]
        if not self._columns:
            raise UserError(
                f"{clusters}: neither a column 'ur90_id' (members) nor 'ur50_id'; it has {', '.join(schema.names)}"
            )
        for name in self._columns:
            kind = schema.types[schema.names.index(name)]
            wanted = "a list of strings" if name == "ur90_id" else "a string"
            if not (_is_list(kind) and _is_string(kind.value_type) if name == "ur90_id" else _is_string(kind)):
                raise UserError(f"{clusters}: column '{name}' is {kind}; it must be {wanted}")

    def __len__(self) -> int:
        return self._clusters.metadata.num_rows

    def __iter__(self) -> Iterator[RawCluster]:
        """Clusters in the order of the parquet. Raises UserError where a file turns out to be damaged."""
        for columns in self._read_columns():
            names = columns.get("ur50_id") or [None] * len(columns["ur90_id"])
            members = columns.get("ur90_id") or [[name] for name in names]
            members = [ids or [] for ids in members]  # null is an empty list
            sequences = self._look_up([member for ids in members for member in ids])
            for name, ids in zip(names, members, strict=True):
                yield (
                    name or (ids[0] if ids else None) or "null",
                    [(member or "null", sequences.get((member or "").encode())) for member in ids],
                )

    def _read_columns(self) -> Iterator[dict[str, list]]:
        try:
            for batch in self._clusters.iter_batches(batch_size=4096, columns=self._columns):
                yield batch.to_pydict()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self._clusters_path}: damaged ({error})") from error

    def _look_up(self, ids: Sequence[str | None]) -> dict[bytes, Any]:
        found: dict[bytes, Any] = {}
        try:
            for start in range(0, len(ids), 5000):  # SQLite takes some 32,000 parameters
                some = ids[start : start + 5000]
                marks = ",".join("?" * len(some))
                query = f"SELECT id, sequence FROM protein WHERE id IN ({marks})"
                found.update(self._sequences.execute(query, some))
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self._sequences_path}: cannot be read ({error})") from error
        return found


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file ({error})") from error


def _open_proteins(path: Path) -> sqlite3.Connection:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    connection.text_factory = bytes
    try:
        columns = {row[1].lower() for row in connection.execute("PRAGMA table_info(protein)")}
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path}: cannot be read as an SQLite database ({error})") from error
    if not {b"id", b"sequence"} <= columns:
        raise UserError(f"{path}: no table 'protein' with columns 'id' and 'sequence'")
    return connection


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def write_split(
    clusters: Iterable[RawCluster], out: Path, inputs: dict[str, str], max_reject_fraction: float
) -> dict[str, Any]:
    """Write clusters as MDS shards into the new folder `out`, and beside them `conversion.json`.

    The folder appears whole: it is written under another name, and renamed at the end.

    Args:
        inputs: what was read, for `conversion.json`.
        max_reject_fraction: the share of rejected members above which nothing is written.

    Returns:
        The content of `conversion.json`.

    Raises:
        UserError: `out` exists, nothing is left to write, or too much is rejected.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} exists already; remove it, or choose another folder")
    partial = out.with_name(f".{out.name}.partial")
    try:
        if partial.exists():  # of a run that did not end
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{partial}: cannot be written ({error.strerror})") from error
    report, start = Report(), time.monotonic()
    try:
        _write_shards(clusters, partial, report)
        _check(report, max_reject_fraction)
    except UserError:
        shutil.rmtree(partial)
        raise
    elapsed = time.monotonic() - start
    conversion = {"inputs": inputs, **report.as_dict(), "elapsed_seconds": round(elapsed, 2)}
    (partial / "conversion.json").write_text(json.dumps(conversion, indent=2) + "\n")
    partial.rename(out)
    return conversion


def _write_shards(clusters: Iterable[RawCluster], folder: Path, report: Report) -> None:
    with MDSWriter(
        out=str(folder), columns=COLUMNS, compression="zstd", hashes=["xxh64"], size_limit=SHARD_BYTES
    ) as writer:
        for cluster in clusters:
            record = build_record(cluster, report)
            if record is not None:
                writer.write(record)


def _check(report: Report, max_reject_fraction: float) -> None:
    if report.rejected_fraction > max_reject_fraction:
        raise UserError(
            f"{report.rejected_fraction:.1%} of {report.counts['members_read']:,} members rejected, "
            f"more than {max_reject_fraction:.1%}: {_summary(report)}"
        )
    if not report.counts["clusters_written"]:
        raise UserError(f"no cluster to write: {_summary(report) or 'the input is empty'}")


def _summary(report: Report) -> str:
    return ", ".join(
        f"{reason} {count:,} (such as {report.examples[reason][0]!r})"
        for reason, count in report.rejected.most_common()
    )
