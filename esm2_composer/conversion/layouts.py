"""The layouts in which clusters and sequences arrive, all brought to the same two things.

`named`, a DuckDB view of (cluster_id VARCHAR, member_ids VARCHAR[]), in any order, a cluster in one row or many;
and an SQLite file with the table protein (id, sequence), indexed by id. BioNeMo's layout has both. For the others
they are made in a scratch folder: code that looks up sequences by id need not know their origin.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Protocol

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from esm2_composer.conversion.fasta import UNIPROT, compression, read_blocks, read_fasta
from esm2_composer.conversion.markers import read_marker, write_marker
from esm2_composer.conversion.proteins import Counted, first_proteins, store_proteins
from esm2_composer.conversion.records import LOOKED_AT, Report, refuse_nucleotides
from esm2_composer.errors import ReadError, TransientError, UserError
from esm2_composer.files import refuse_irregular

FLAT_ROWS_AT_ONCE = 1_000
BUFFER_BYTES = 2**20


class Layout(Protocol):
    """What a conversion needs of an input. Making one raises UserError if a file is not what it should be, or
    TransientError if a database cannot be read for now."""

    inputs: dict[str, list[Path]]  # the files, by the option that named them
    source: Path  # of the clusters, as the user named it
    rows_are_clusters: bool  # a second row of a cluster is then worth reporting
    members_may_be_shared: bool  # False where a member is a cluster by construction

    def stage(self, scratch: Path, report: Report, progress: Counted) -> Path:
        """Make in `scratch` what the layout lacks; the path of the SQLite file."""

    def view(self, database: duckdb.DuckDBPyConnection, scratch: Path) -> None:
        """Create the view `named`."""


def stage(layout: Layout, folder: Path, progress: Counted) -> tuple[Path, Report]:
    """Make in `folder` what `layout` lacks, unless it is there and whole (only the size of the large SQLite file
    is checked); the SQLite file of the sequences.

    Args:
        progress: told how many sequences have been staged.

    Raises:
        UserError: an input is damaged.
    """
    finished = folder / "staged.json"
    content = read_marker(finished)
    if not content or _size(Path(content["sequences"])) != content["bytes"]:
        report = Report()
        path = layout.stage(folder, report, progress).absolute()  # a rerun may start elsewhere
        content = {"sequences": str(path), "bytes": _size(path), "report": report.as_dict()}
        write_marker(finished, content, *folder.glob("ids.parquet"))
    return Path(content["sequences"]), Report.from_dict(content["report"])


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


class BioNeMo:
    """A parquet of clusters and an SQLite file of sequences.

    Training clusters have a column `ur90_id`, list of member ids, and may have `ur50_id`; validation clusters have
    `ur50_id` alone, the id of their only sequence. A cluster without an id gets its first member's.
    """

    rows_are_clusters = True

    def __init__(self, clusters: Path, sequences: Path) -> None:
        self.inputs = {"clusters": [clusters], "sequences": [sequences]}
        self.source = clusters
        schema = _schema(clusters, ("ur50_id", "ur90_id"))
        self._columns = [name for name in ("ur50_id", "ur90_id") if name in schema.names]
        if not self._columns:
            raise UserError(
                f"{clusters}: neither a column 'ur90_id' (members) nor 'ur50_id'; it has {', '.join(schema.names)}"
            )
        self.members_may_be_shared = "ur90_id" in self._columns
        for name in self._columns:
            kind = schema.field(name).type
            if name == "ur90_id" and not (_is_list(kind) and _is_string(kind.value_type)):
                raise UserError(f"{clusters}: column 'ur90_id' is {kind}; it must be a list of strings")
            if name == "ur50_id" and not _is_string(kind):
                raise UserError(f"{clusters}: column 'ur50_id' is {kind}; it must be a string")
        refuse_irregular(sequences)
        if not sequences.is_file():
            raise UserError(f"{sequences}: no such file")
        try:
            refuse_nucleotides(sequences, first_proteins(sequences, LOOKED_AT))
        except ReadError as error:  # locked, or a disk that fails
            raise TransientError(error) from error

    def stage(self, scratch: Path, report: Report, progress: Counted) -> Path:
        return self.inputs["sequences"][0]

    def view(self, database: duckdb.DuckDBPyConnection, scratch: Path) -> None:
        members = "coalesce(ur90_id, [])" if "ur90_id" in self._columns else "[ur50_id]"
        names = ["nullif(ur50_id, '')"] if "ur50_id" in self._columns else []
        names += ["list_filter(ur90_id, lambda id: id != '')[1]"] if "ur90_id" in self._columns else []
        clusters = database.read_parquet(literal(self.inputs["clusters"]))
        clusters.project(f"coalesce({', '.join(names)}) AS cluster_id, {members} AS member_ids").create_view(
            "named"
        )


class Flat:
    """Parquet with one row per member: `ur50_id`, `ur90_id`, `sequence`; one file, or a folder of them."""

    rows_are_clusters = False
    members_may_be_shared = True
    columns = ("ur50_id", "ur90_id", "sequence")

    def __init__(self, path: Path) -> None:
        files = list(_search(path, set())) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path}: no .parquet file in this folder")
        self.inputs = {"flat": files}
        self.source = path
        for file in files:
            schema = _schema(file, self.columns)
            for name in self.columns:
                if name not in schema.names:
                    raise UserError(f"{file}: no column '{name}'; it has {', '.join(schema.names)}")
                if not _is_string(schema.field(name).type):
                    raise UserError(f"{file}: column '{name}' is {schema.field(name).type}; it must be a string")
            refuse_nucleotides(file, read_flat(file))

    def stage(self, scratch: Path, report: Report, progress: Counted) -> Path:
        return store_proteins(scratch / "sequences.db", self._proteins(), report, progress)

    def _proteins(self) -> Iterator[tuple[str | None, str | None]]:
        for file in self.inputs["flat"]:
            yield from read_flat(file)

    def view(self, database: duckdb.DuckDBPyConnection, scratch: Path) -> None:
        rows = database.read_parquet(literal(self.inputs["flat"]))
        rows.project("nullif(ur50_id, '') AS cluster_id, [ur90_id] AS member_ids").create_view("named")


def _search(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """The parquet files of a folder and those below, links followed, each folder once; not what is hidden, as
    Spark's `_temporary` and macOS's `._x.parquet` are."""
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "_")):
            continue
        if path.is_dir():  # even if named x.parquet, as Spark names its output
            yield from _search(path, seen)
        elif path.suffix == ".parquet":
            yield path


def read_flat(file: Path, row_group: int | None = None) -> Iterator[tuple[str | None, str | None]]:
    """(member id, sequence) of the rows, all or those of a row group. Raises UserError if they are damaged."""
    groups = None if row_group is None else [row_group]
    with reading(file):
        for batch in open_parquet(file).iter_batches(FLAT_ROWS_AT_ONCE, groups, ["ur90_id", "sequence"]):
            yield from zip(batch["ur90_id"].to_pylist(), batch["sequence"].to_pylist(), strict=True)


class Fasta:
    """FASTA files (plain, gzip or zstd), and MMseqs2's cluster TSV: representative, tab, member.

    Without a TSV every sequence is its own cluster. An id is a header's first word; of `sp|P12345|NAME` it is
    `P12345`, as MMseqs2 names it in its TSV.
    """

    rows_are_clusters = False

    def __init__(self, fasta: Sequence[Path], cluster_tsv: Path | None = None) -> None:
        self.inputs = {"cluster_tsv": [cluster_tsv]} if cluster_tsv else {}
        self.inputs["fasta"] = list(fasta)
        self._tsv = cluster_tsv
        self.source = cluster_tsv or fasta[0]
        self.members_may_be_shared = cluster_tsv is not None
        for path in chain.from_iterable(self.inputs.values()):
            refuse_irregular(path)
            if not path.is_file():
                raise UserError(f"{path}: no such file")

    def stage(self, scratch: Path, report: Report, progress: Counted) -> Path:
        return store_proteins(scratch / "sequences.db", self._proteins(report), report, progress)

    def _proteins(self, report: Report) -> Iterator[tuple[str, bytes]]:
        for path in self.inputs["fasta"]:
            for number, (name, sequence) in enumerate(read_fasta(path), 1):
                if name:
                    yield name, sequence
                else:
                    report.counts["members_read"] += 1
                    report.reject("header without id", f"record {number} of {path.name}", 1)

    def view(self, database: duckdb.DuckDBPyConnection, scratch: Path) -> None:
        if self._tsv:
            rows = database.read_csv(
                literal([_unpacked(self._tsv, scratch / "clusters.tsv")]),
                compression="none",
                sep="\t",
                header=False,
                quotechar="",
                escapechar="",
                auto_detect=False,
                columns={"cluster": "VARCHAR", "member": "VARCHAR"},
            )
            rows.project(
                f"{_accession('cluster')} AS cluster_id, [{_accession('member')}] AS member_ids"
            ).create_view("named")
        else:
            ids = database.read_parquet(literal([scratch / "ids.parquet"]))
            ids.project("id AS cluster_id, [id] AS member_ids").create_view("named")


def _unpacked(path: Path, copy: Path) -> Path:
    """`path`, or, if it is compressed, its content in `copy`: DuckDB takes a zstd file cut short for whole."""
    with open(path, "rb") as file:
        if not compression(file.read(4)):
            return path
    with open(copy, "wb") as file:
        file.writelines(read_blocks(path))
    return copy


def _accession(column: str) -> str:
    """SQL for what `read_fasta` makes of an id."""
    bare = f"trim({column})"
    return f"coalesce(nullif(regexp_extract({bare}, '{UNIPROT.pattern}', 1), ''), nullif({bare}, ''))"


def _schema(path: Path, wanted: Sequence[str]) -> pa.Schema:
    """Raises UserError if two columns have a wanted name, in any case: DuckDB would take the first."""
    schema = open_parquet(path).schema_arrow
    for name in wanted:
        alike = [other for other in schema.names if other.lower() == name]
        if len(alike) > 1:
            raise UserError(f"{path}: the columns {', '.join(alike)} have one name, but for case; keep one")
    return schema


def open_parquet(path: Path) -> pq.ParquetFile:
    """Raises UserError if it is not parquet, ReadError if the system cannot read it."""
    refuse_irregular(path)
    try:
        return pq.ParquetFile(
            path,
            buffer_size=BUFFER_BYTES,
            pre_buffer=False,  # else it reads whole row groups
            page_checksum_verification=True,  # of files that have them
        )
    except FileNotFoundError:
        raise ReadError(f"{path}: no such file") from None
    except UnicodeEncodeError:
        raise UserError(f"{path}: its path is not UTF-8") from None
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if _is_passing(error):
            raise ReadError(f"{path}: cannot be read ({error})") from error
        raise UserError(f"{path}: not a parquet file ({error})") from error


@contextlib.contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn what Arrow and DuckDB raise for a damaged file into a UserError.

    Temporary faults, of memory or of a disk, whether reading or writing, pass through.
    """
    try:
        yield
    except RuntimeError as error:
        if str(error) == "Query interrupted":  # DuckDB's word for Ctrl-C
            raise KeyboardInterrupt from None
        raise
    except (pa.ArrowException, UnicodeDecodeError, OSError, duckdb.Error) as error:
        if _is_passing(error):
            raise
        reason = re.split(r"\s*Possible (?:fixes|Solution)", str(error))[0]  # DuckDB's options are not ours
        raise UserError(f"{path}: damaged ({reason[:300]})") from error


def _is_passing(error: Exception) -> bool:
    """Whether the system failed; for damage Arrow sets no errno, and DuckDB raises other types, with one
    exception."""
    if isinstance(error, duckdb.IOException):
        return "Could not read enough bytes" not in str(error)  # a length in the file says more than there is
    out_of_memory = duckdb.OutOfMemoryException, MemoryError
    return isinstance(error, out_of_memory) or getattr(error, "errno", None) is not None


def literal(paths: Sequence[Path]) -> list[str]:
    """Paths as DuckDB takes them, which would read *, ? and [ as patterns."""
    return [re.sub(r"([*?\[])", r"[\1]", str(path)) for path in paths]


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)
