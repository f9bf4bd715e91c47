"""Sequences by id: an SQLite file with the table protein (id, sequence), as BioNeMo has it."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from esm2_composer.conversion.records import Report
from esm2_composer.errors import ReadError, UserError
from esm2_composer.files import refuse_irregular, sync

# What is held at once. Sequences, of which any may be long, are counted in bytes where their lengths are known.
ROWS_AT_ONCE, BYTES_AT_ONCE = 20_000, 64 * 2**20

# Called with the number of sequences stored.
Counted = Callable[[int], None]


def store_proteins(
    path: Path, proteins: Iterator[tuple[str | None, str | bytes | None]], report: Report, progress: Counted
) -> Path:
    """Write the SQLite file of `proteins`, ids maybe repeated, and next to it ids.parquet."""
    path.unlink(missing_ok=True)  # of a run that did not end
    schema = pa.schema({"id": pa.string()})
    with (
        contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database,
        pq.ParquetWriter(path.with_name("ids.parquet"), schema, compression="zstd") as ids,
    ):
        sort_within(path.parent, database)
        database.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; BEGIN;"
            "CREATE TABLE protein (id TEXT, sequence TEXT)"
        )
        for rows in _batches(proteins):
            database.executemany("INSERT INTO protein VALUES (?, ?)", rows)
            ids.write_table(pa.table({"id": [name for name, _ in rows]}, schema))
            report.counts["sequences_read"] += len(rows)
            progress(report.counts["sequences_read"])
        database.execute("CREATE INDEX protein_id ON protein (id)")  # SQLite sorts on disk
        database.execute("COMMIT")
    sync(path)
    sync(path.with_name("ids.parquet"))
    return path


def sort_within(folder: Path, database: sqlite3.Connection) -> None:
    """Have SQLite sort in `folder` what does not fit in memory; its default, /var/tmp, may be small."""
    path = str(folder.absolute()).replace("'", "''")
    with contextlib.suppress(UnicodeEncodeError):  # SQLite cannot express such a path
        database.execute(f"PRAGMA temp_store_directory = '{path}'")


def _batches(
    proteins: Iterator[tuple[str | None, str | bytes | None]],
) -> Iterator[list[tuple[str | None, str | bytes | None]]]:
    batch, size = [], 0
    for protein in proteins:
        batch.append(protein)
        size += len(protein[1] or "")
        if len(batch) >= ROWS_AT_ONCE or size >= BYTES_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Sequences:
    """Look-up of sequences in an SQLite file with the table protein (id, sequence)."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if it is not one, or has no index to look ids up."""
        self._path = path
        self._database = open_proteins(path)

    def look_up(self, ids: Sequence[str]) -> dict[bytes, list]:
        """Every sequence under each id that there is; sequences are bytes, or what else a wrong table holds.

        Args:
            ids: at most 32,766, which is as many parameters as SQLite takes.
        """
        found: dict[bytes, list] = {}
        marks = ",".join("?" * len(ids))
        with _reading_proteins(self._path):
            query = f"SELECT id, sequence FROM protein WHERE id IN ({marks})"
            for name, sequence in self._database.execute(query, ids):
                found.setdefault(name, []).append(sequence)
        return found

    def close(self) -> None:
        self._database.close()


def open_proteins(path: Path) -> sqlite3.Connection:
    """Open the SQLite file for reading; ids and sequences come as bytes.

    Raises UserError if it is unusable, ReadError if the system cannot read it.
    """
    refuse_irregular(path)
    if not path.is_file():
        raise ReadError(f"{path}: no such file")
    database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    database.text_factory = bytes
    with _reading_proteins(path):
        columns = {row[1].lower() for row in database.execute("PRAGMA table_info(protein)")}
        if not {b"id", b"sequence"} <= columns:
            raise UserError(f"{path}: no table 'protein' with columns 'id' and 'sequence'")
        steps = database.execute("EXPLAIN QUERY PLAN SELECT sequence FROM protein WHERE id = 'a'")
        if any(step.startswith(b"SCAN") or b"USING AUTOMATIC" in step for *_, step in steps):  # a view has several
            raise UserError(
                f"{path}: table 'protein' has no index on 'id', so each look-up would read it whole; "
                "CREATE INDEX protein_id ON protein (id)"
            )
        ((page,),) = database.execute("PRAGMA page_size")
        size = path.stat().st_size
        if size % page:  # SQLite reads a file that lacks less than a page
            raise UserError(f"{path}: cut short ({size:,} bytes, which are no whole pages of {page:,})")
    return database


def first_proteins(path: Path, count: int) -> Iterator[tuple[bytes | None, Any]]:
    """(id, sequence) of up to `count` rows."""
    with contextlib.closing(open_proteins(path)) as database, _reading_proteins(path):
        yield from database.execute("SELECT id, sequence FROM protein LIMIT ?", (count,))


def read_proteins(path: Path, first: int, last: int) -> Iterator[tuple[bytes | None, Any]]:
    """(id, sequence) of the rows `first` to `last`, both included, in the order of the file."""
    with contextlib.closing(open_proteins(path)) as database, _reading_proteins(path):
        query = "SELECT id, sequence FROM protein WHERE rowid BETWEEN ? AND ?"
        yield from database.execute(query, (first, last))


def protein_rows(path: Path) -> tuple[int, int]:
    """The first and the last row of the SQLite file, (0, -1) if it has none.

    Raises UserError if rows have no numbers.
    """
    query = "SELECT min(rowid), max(rowid), EXISTS (SELECT 1 FROM protein) FROM protein"
    with contextlib.closing(open_proteins(path)) as database, _reading_proteins(path):
        try:
            first, last, any_row = database.execute(query).fetchone()
        except sqlite3.OperationalError as error:
            if "no such column" not in str(error):
                raise
            raise UserError(f"{path}: table 'protein' has no row numbers ({error})") from error
    if any_row and not isinstance(first, int):  # a view has null
        raise UserError(f"{path}: table 'protein' has no row numbers; is it a view?")
    return (first, last) if any_row else (0, -1)


@contextlib.contextmanager
def _reading_proteins(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:  # locked, or the disk fails; damage has other types
        raise ReadError(f"{path}: cannot be read ({error})") from error
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path}: cannot be read as an SQLite database ({error})") from error
