"""Which clusters a split holds, in which order, and where the work is cut: the plan of a conversion.

The order is that of the MD5 of the cluster's id. So it does not depend on the layout or the order of the input,
two rows of one cluster end up next to each other, every shard is a random sample of the whole, and what is sorted
is small: ids, no sequences. DuckDB sorts and joins, on disk if memory does not suffice.

plan.parquet holds rows of (cluster_id, member_ids, shared_ids, in_other_split), one row group per part: the number
of parts and their boundaries depend only on the input, whoever works on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from esm2_composer.conversion.destinations import OtherSplit
from esm2_composer.conversion.layouts import Layout, literal, reading
from esm2_composer.conversion.markers import read_marker, write_marker
from esm2_composer.conversion.records import EXAMPLES_KEPT, Report
from esm2_composer.files import sync

# A part ends with the cluster that reaches one of these: some 30 MB of UniRef, a second or two of work.
PART_CLUSTERS, PART_MEMBERS = 32_768, 131_072
# DuckDB's limits. At 2 µs per cluster, more threads would save seconds, and cost a small machine its memory.
MAX_THREADS, MEMORY_A_THREAD = 8, 384 * 2**20
SCHEMA = pa.schema(
    {
        "cluster_id": pa.string(),
        "member_ids": pa.list_(pa.string()),
        "shared_ids": pa.list_(pa.string()),  # of these, those that another cluster keeps; null: none
        "in_other_split": pa.bool_(),
    }
)


@dataclass
class Plan:
    """What the parts are cut from."""

    path: Path
    parts: int
    clusters: int
    members: int  # named, rejected ones included
    rows: int  # where they are clusters, and how many of those name no member
    rows_without_members: int
    report: Report  # of what was rejected before any sequence was looked at


def make_plan(layout: Layout, folder: Path, other_split: OtherSplit | None, threads: int, staged: Report) -> Plan:
    """Plan the conversion of `layout` in `folder`, or read the plan there if it is complete.

    Args:
        other_split: the one whose clusters must not occur again.
        staged: what staging found.

    Raises:
        UserError: an input, or the other split's table of ids, is damaged.
    """
    finished, path = folder / "plan.json", folder / "plan.parquet"
    record = read_marker(finished)
    if not record:
        report = Report()
        with reading(layout.source), _open_database(folder, min(threads, MAX_THREADS)) as database:
            layout.view(database, folder)
            record = _write_plan(layout, database, path, other_split, report)
        sync(path)
        record["report"] = report.as_dict()
        write_marker(finished, record, path)
    report = Report.from_dict(record["report"])
    report.merge(staged)
    members = record["members"] + report.counts["members_read"]
    rows = record["rows"], record["rows_without_members"]
    return Plan(path, record["parts"], record["clusters"], members, *rows, report)


def _open_database(folder: Path, threads: int) -> duckdb.DuckDBPyConnection:
    return duckdb.connect(
        config={
            "threads": threads,
            "memory_limit": f"{threads * MEMORY_A_THREAD // 2**20}MiB",
            "temp_directory": str(folder / "duckdb"),
            "preserve_insertion_order": False,
            "autoinstall_known_extensions": False,
        }
    )


def _write_plan(
    layout: Layout, database: duckdb.DuckDBPyConnection, path: Path, other_split: OtherSplit | None, report: Report
) -> dict[str, Any]:
    """Write plan.parquet; the numbers of `Plan`."""
    _reject_nameless(database, report)
    _find_shared_members(database, layout.members_may_be_shared)
    _find_clusters_of(database, other_split)
    rows = database.sql(
        "SELECT cluster_id, member_ids, shared_ids, other.cluster_id IS NOT NULL AS in_other_split "
        "FROM named LEFT JOIN shared USING (cluster_id) LEFT JOIN other USING (cluster_id) "
        "WHERE cluster_id IS NOT NULL ORDER BY md5_number(cluster_id)"
    )
    parts = clusters = members = 0
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for part, starts, named in _cut(rows.to_arrow_reader(4096)):
            writer.write_table(part, row_group_size=max(len(part), 1))
            parts, clusters, members = parts + 1, clusters + starts, members + named
    rows, empty = _count_rows(database) if layout.rows_are_clusters else (0, 0)
    return {
        "parts": parts,
        "clusters": clusters,
        "members": members,
        "rows": rows,
        "rows_without_members": empty,
    }


def _reject_nameless(database: duckdb.DuckDBPyConnection, report: Report) -> None:
    """Rows without a cluster's id: their members cannot be placed."""
    ((rows, members),) = database.execute(
        "SELECT count(*), coalesce(sum(len(member_ids)), 0)::BIGINT FROM named WHERE cluster_id IS NULL"
    ).fetchall()
    if not rows:
        return
    examples = database.execute(
        "SELECT coalesce(member_ids[1], 'null') AS example FROM named WHERE cluster_id IS NULL "
        f"ORDER BY example LIMIT {EXAMPLES_KEPT}"
    ).fetchall()
    report.counts.update(members_read=members, members_rejected=members)
    report.rejected["row without cluster id"] = {"count": rows, "examples": [example for (example,) in examples]}


def _count_rows(database: duckdb.DuckDBPyConnection) -> tuple[int, int]:
    """How many rows there are, and how many of them name no member."""
    return database.execute("SELECT count(*), count(*) FILTER (len(member_ids) = 0) FROM named").fetchone()


def _find_shared_members(database: duckdb.DuckDBPyConnection, possible: bool) -> None:
    """Make the table `shared` of (cluster_id, shared_ids): members that another cluster, first in order, keeps.

    Ids are grouped by a 64-bit hash first, which takes a tenth of the time of grouping the ids themselves; only
    those whose hash occurs twice are examined.
    """
    database.execute("CREATE TABLE shared (cluster_id VARCHAR, shared_ids VARCHAR[])")
    if not possible:
        return
    database.execute(
        "CREATE TABLE suspects AS SELECT h FROM (SELECT hash(unnest(member_ids)) AS h FROM named "
        "WHERE cluster_id IS NOT NULL) GROUP BY h HAVING count(*) > 1"
    )
    database.execute(
        "CREATE TABLE owners AS SELECT member_id, arg_min(cluster_id, md5_number(cluster_id)) AS owner FROM "
        "(SELECT cluster_id, unnest(member_ids) AS member_id FROM named WHERE cluster_id IS NOT NULL) "
        "WHERE hash(member_id) IN (FROM suspects) AND member_id != '' GROUP BY member_id "
        "HAVING count(DISTINCT cluster_id) > 1"
    )
    database.execute(
        "INSERT INTO shared SELECT cluster_id, list(DISTINCT member_id) FROM "
        "(SELECT cluster_id, unnest(member_ids) AS member_id FROM named WHERE cluster_id IS NOT NULL) "
        "JOIN owners USING (member_id) WHERE cluster_id != owner GROUP BY cluster_id"
    )


def _find_clusters_of(database: duckdb.DuckDBPyConnection, other_split: OtherSplit | None) -> None:
    """Make the table `other` of those clusters that the other split has."""
    database.execute("CREATE TABLE other (cluster_id VARCHAR)")
    if not other_split:
        return
    path = other_split.cluster_ids
    with reading(path):  # `named` has been read before
        database.read_parquet(literal([path])).create_view("theirs")
        query = "SELECT DISTINCT cluster_id FROM theirs JOIN named USING (cluster_id)"
        database.execute(f"INSERT INTO other {query}")


def _cut(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[pa.Table, int, int]]:
    """(rows, clusters, members) of each part; parts begin where a cluster does."""
    held: list[pa.RecordBatch] = []
    clusters = members = 0
    last = None
    for batch in batches:
        names = batch["cluster_id"].to_numpy(zero_copy_only=False)
        starts = names != np.concatenate([[last], names[:-1]])
        last = names[-1]
        sizes = np.diff(batch["member_ids"].offsets.to_numpy())
        while len(batch):
            before_clusters = clusters + np.cumsum(starts) - starts
            before_members = members + np.cumsum(sizes) - sizes
            full = starts & ((before_clusters >= PART_CLUSTERS) | (before_members >= PART_MEMBERS))
            end = int(full.argmax()) if full.any() else len(batch)
            held.append(batch.slice(0, end))
            clusters, members = clusters + int(starts[:end].sum()), members + int(sizes[:end].sum())
            if full.any():
                yield _table(held), clusters, members
                held, clusters, members = [], 0, 0
            batch, starts, sizes = batch.slice(end), starts[end:], sizes[end:]
    if held:
        yield _table(held), clusters, members


def _table(batches: list[pa.RecordBatch]) -> pa.Table:
    return pa.Table.from_batches(batches).cast(SCHEMA)


def read_part(plan: Path, number: int) -> Iterator[tuple[str, list[str | None], list[str], bool, int]]:
    """(id, members named, those another cluster keeps, whether the other split has it, rows) of each cluster.

    Raises UserError if the plan is damaged.
    """
    with reading(f"{plan} (the same command makes it anew)"):
        rows = pq.ParquetFile(plan).read_row_group(number).to_pydict()
    pa.default_memory_pool().release_unused()  # of a huge cluster, more than its ids take
    current: list[Any] | None = None
    for name, named, shared, elsewhere in zip(*rows.values(), strict=True):
        if current and current[0] == name:
            current[1].extend(named)
            current[4] += 1
            continue
        if current:
            yield tuple(current)
        current = [name, named, shared or [], elsewhere, 1]
    if current:
        yield tuple(current)
