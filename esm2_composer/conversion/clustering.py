"""FASTA -> clusters as UniRef has them, by MMseqs2, split into training and validation, in BioNeMo's layout.

1. Clusters at 90 % identity over 80 % of both sequences: their representatives, the longest sequences, are the
   members; everything else is left out, as UniRef90 leaves it out.
2. The representatives, clustered in the same way at 50 %: the clusters.
3. A share of the clusters, chosen by a hash of the seed and the representative's id, becomes validation: of each
   its representative alone. None has more than 5,000 residues.
4. Members of training clusters that match a validation sequence, at 50 % identity over 80 % of both, are removed.

Sequences below 11 residues are left out first, as UniRef90 does, and of exact copies all but the first, as
UniRef100 does: MMseqs2 does not join all copies, and would leave some in both splits. It sees numbers for ids, so
that no header can confuse it. What does not fit memory is for SQLite and MMseqs2 to keep on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from esm2_composer.conversion.fasta import read_fasta
from esm2_composer.conversion.proteins import sort_within
from esm2_composer.conversion.records import TOO_MANY_REJECTED, Report, clean
from esm2_composer.errors import TransientError, UserError, system_error
from esm2_composer.files import refuse_existing, refuse_irregular, try_lock

MIN_RESIDUES = 11
# Of a validation sequence. MMseqs2's scores stop at 32,766, which alignments of some 6,000 residues reach. Above
# that it may miss near-copies with gaps, which would then be in both splits.
MAX_VALID_RESIDUES = 5_000
COVERAGE = ("-c", "0.8", "--cov-mode", "0")  # 80 % of both sequences
CLUSTER = (*COVERAGE, "--cluster-mode", "2", "--cluster-reassign", "1", "--min-seq-id")
SEARCH = (*COVERAGE, "-s", "6", "--min-seq-id", "0.5", "--format-output", "query")
ROWS_AT_ONCE = 20_000
NEARLY_FULL = 64 * 2**20  # bytes left; MMseqs2 ends when a block of its output no longer fits

# Rows of the table member (number, cluster, valid); a cluster is named by its representative's number.
TRAIN, VALID = "NOT valid", "valid AND number = cluster"


def build_clusters(
    fasta: Sequence[Path],
    out: Path,
    valid_fraction: float,
    seed: int,
    threads: int,
    max_reject_fraction: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write the new folder `out`: the four files of BioNeMo's layout and report.json.

    The folder appears whole: it is made under another name, and renamed at the end.

    Args:
        valid_fraction: of the clusters, above 0 and below 1; at least one cluster becomes validation.
        say: told what is being done, a line at a time.

    Returns:
        The content of report.json.

    Raises:
        UserError: there is no MMseqs2 or it fails, `out` exists or is being made, an input cannot be read, too
            much of it is unusable, or what is left makes fewer than two clusters.
        TransientError: the disk is full, or fails.
    """
    version = mmseqs_version()
    refuse_existing(out, "folder")
    for path in fasta:
        refuse_irregular(path)
    partial = out.with_name(f".{out.name}.partial")
    with _locked(partial):
        try:
            report = {
                "fasta": [str(path) for path in fasta],
                "mmseqs": version,
                "seed": seed,
                "valid_fraction": valid_fraction,
                **_build(fasta, partial, valid_fraction, seed, threads, max_reject_fraction, say),
            }
            (partial / "report.json").write_text(json.dumps(report, indent=2) + "\n")
            partial.rename(out)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)  # an mmseqs that has not died yet may still write there
            told = f"{partial}: cannot be written ({error})"
            if isinstance(error, OSError):
                raise system_error(told, error) from error
            if isinstance(error, sqlite3.OperationalError):  # as a full disk is to SQLite
                raise TransientError(told) from error
            raise
    return report


def mmseqs_version() -> str:
    """Raises UserError if there is no `mmseqs` to run."""
    if not shutil.which("mmseqs"):
        raise UserError("there is no mmseqs on PATH: install MMseqs2 (Debian and Ubuntu: apt install mmseqs2)")
    return subprocess.run(["mmseqs", "version"], capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """An empty folder that no other process uses; what a killed one left in it is removed.

    MMseqs2 goes on when this process is killed, so it inherits the lock: the folder is free when both are gone.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        os.set_inheritable(handle, True)
    except OSError as error:
        raise system_error(f"{folder}: cannot be written ({error.strerror})", error) from error
    try:
        try:
            mine = try_lock(handle)
        except OSError as error:
            raise system_error(f"{folder}: cannot be locked ({error.strerror})", error) from error
        if not mine:
            raise UserError(
                f"{folder}: another run is at work there, or the mmseqs of one that was killed; "
                "wait for it or stop it"
            )
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield
    finally:
        os.close(handle)


def _build(fasta, folder, valid_fraction, seed, threads, max_reject_fraction, say) -> dict[str, Any]:
    start = time.monotonic()
    work = folder / "work"
    work.mkdir()
    with contextlib.closing(sqlite3.connect(work / "proteins.db", isolation_level=None)) as database:
        sort_within(work, database)
        database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; BEGIN")
        report = _stage(fasta, database, max_reject_fraction, say)
        _cluster(database, work, threads, say)
        clusters = _count(database, "DISTINCT cluster", "1")
        if clusters < 2:
            raise UserError("all sequences fall into one cluster, which leaves none for validation")
        report["counts"].update(members_at_90=_count(database, "number", "1"), clusters_at_50=clusters)
        _choose_valid(database, min(max(round(valid_fraction * clusters), 1), clusters - 1), seed)
        report["counts"].update(_remove_like_valid(database, work, threads, say))
        say("writing clusters and sequences")
        _write_layout(database, folder)
    shutil.rmtree(work)
    return {**report, "elapsed_seconds": round(time.monotonic() - start, 1)}


def _stage(fasta, database, max_reject_fraction, say) -> dict[str, Any]:
    """Fill the table `protein` with what can be used; tell what cannot, and why.

    As in a conversion, entries under one id count once if they clean to the same; if not, the id is rejected.
    """
    counts, report = Counter(), Report()
    database.execute(
        "CREATE TABLE protein "
        "(number INTEGER PRIMARY KEY, id TEXT UNIQUE, sequence TEXT, changes TEXT, reason TEXT)"
    )
    for path in fasta:
        say(f"reading {path}")
        for number, (name, raw) in enumerate(read_fasta(path), 1):
            counts["sequences_read"] += 1
            if name:
                counts["sequences_given_again"] += not _insert(database, name, raw)
            else:
                report.reject("header without id", f"record {number} of {path.name}", 1)
    for reason, name in database.execute("SELECT reason, id FROM protein WHERE reason != '' ORDER BY number"):
        report.reject(reason, name, 1)
    database.execute("DELETE FROM protein WHERE reason != ''")
    lost, reasons = report.counts["members_rejected"], report.reasons()
    if lost > max_reject_fraction * counts["sequences_read"]:
        raise UserError(
            f"{lost:,} of {counts['sequences_read']:,} sequences rejected, "
            f"more than {max_reject_fraction:.1%}: {reasons}; {TOO_MANY_REJECTED}"
        )
    short = database.execute("DELETE FROM protein WHERE length(sequence) < ?", (MIN_RESIDUES,)).rowcount
    copies = _remove_copies(database)
    (used,) = database.execute("SELECT count(*) FROM protein").fetchone()
    if not used:
        raise UserError(f"no sequence of {MIN_RESIDUES} residues or more: {reasons or 'the input has none'}")
    counts.update(sequences_too_short=short, sequences_given_under_another_id=copies, sequences_used=used)
    changed = Counter()
    for changes, count in database.execute("SELECT changes, count(*) FROM protein WHERE changes != '' GROUP BY 1"):
        changed.update(dict.fromkeys(changes.split(", "), count))
    return {"counts": counts, "changed": changed, "rejected": report.rejected}


def _remove_copies(database: sqlite3.Connection) -> int:
    """Of each sequence keep the first id alone; gives the number of ids removed."""

    def digest(sequence: str) -> bytes:  # sorted in the sequences' place, which are twenty times as long
        return hashlib.blake2b(sequence.encode(), digest_size=16).digest()

    database.create_function("digest", 1, digest, deterministic=True)
    return database.execute(
        "DELETE FROM protein WHERE number NOT IN (SELECT min(number) FROM protein GROUP BY digest(sequence))"
    ).rowcount


def _insert(database: sqlite3.Connection, name: str, raw: bytes) -> bool:
    """Whether the id is new. If it is not, and had another sequence, its row is rejected."""
    try:
        residues, changes = clean(raw)
        row = (name, residues.decode(), ", ".join(changes), "")
    except ValueError as reason:
        row = (name, "", "", str(reason))
    if database.execute("INSERT OR IGNORE INTO protein VALUES (NULL, ?, ?, ?, ?)", row).rowcount:
        return True
    database.execute(
        "UPDATE protein SET reason = 'different sequences under one id' "
        "WHERE id = ? AND (sequence, reason) IS NOT (?, ?)",
        (name, row[1], row[3]),
    )
    return False


def _cluster(database, work, threads, say) -> None:
    """Make the table member: the representatives at 90 %, clustered at 50 %.

    The order of MMseqs2's input decides which of two equally long proteins represents the other, and the order of
    its output is another each time. So the first step's output is put in order before it is the second's input.
    """
    database.execute("CREATE TABLE member (number INTEGER PRIMARY KEY, cluster INTEGER, valid INTEGER)")
    database.execute("INSERT INTO member (number, cluster) SELECT number, number FROM protein")
    for identity in ("0.9", "0.5"):
        say(f"clustering at {identity} identity")
        _write_fasta(database, work / "representatives.fasta", "number = cluster")
        _mmseqs("easy-cluster", work, ("representatives.fasta", "found"), (*CLUSTER, identity), threads)
        database.execute("DELETE FROM member")
        with open(work / "found_cluster.tsv") as lines:
            pairs = (line.split() for line in lines)
            database.executemany("INSERT INTO member (cluster, number) VALUES (?, ?)", pairs)


def _choose_valid(database: sqlite3.Connection, count: int, seed: int) -> None:
    """Make the `count` clusters with the smallest hashes of seed and id validation, whatever their order.

    Those of representatives above MAX_VALID_RESIDUES are not chosen, so there may be fewer.

    Raises UserError if there is none to choose.
    """

    def key(name: str) -> bytes:
        return hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()

    database.create_function("key", 1, key, deterministic=True)
    database.execute(
        "CREATE TABLE chosen AS SELECT cluster FROM member JOIN protein USING (number) "
        "WHERE number = cluster AND length(sequence) <= ? ORDER BY key(id) LIMIT ?",
        (MAX_VALID_RESIDUES, count),
    )
    if not database.execute("SELECT count(*) FROM chosen").fetchone()[0]:
        raise UserError(f"no cluster for validation: all have more than {MAX_VALID_RESIDUES:,} residues")
    database.execute("UPDATE member SET valid = cluster IN chosen")


def _remove_like_valid(database, work, threads, say) -> dict[str, int]:
    """Remove the training members that match a validation sequence; gives the counts after it."""
    _write_fasta(database, work / "train.fasta", TRAIN)
    _write_fasta(database, work / "valid.fasta", VALID)
    clusters, members = (_count(database, what, TRAIN) for what in ("DISTINCT cluster", "number"))
    say("searching training members that match a validation sequence")
    _mmseqs("easy-search", work, ("train.fasta", "valid.fasta", "hits"), SEARCH, threads)
    with open(work / "hits") as lines:
        database.executemany("DELETE FROM member WHERE number = ?", (line.split() for line in lines))
    clusters_left, members_left = (_count(database, what, TRAIN) for what in ("DISTINCT cluster", "number"))
    if not clusters_left:
        raise UserError(f"all {members:,} training members match a validation sequence")
    return {
        "clusters_valid": _count(database, "number", VALID),
        "clusters_train": clusters_left,
        "members_train": members_left,
        "members_like_valid": members - members_left,
        "clusters_emptied": clusters - clusters_left,
    }


def _count(database: sqlite3.Connection, what: str, which: str) -> int:
    return database.execute(f"SELECT count({what}) FROM member WHERE {which}").fetchone()[0]


def _write_fasta(database: sqlite3.Connection, path: Path, which: str) -> None:
    """Members by number, in that order."""
    query = f"SELECT number, sequence FROM member JOIN protein USING (number) WHERE {which} ORDER BY number"
    with open(path, "w") as file:
        for number, sequence in database.execute(query):
            file.write(f">{number}\n{sequence}\n")


def _mmseqs(command: str, work: Path, files: Sequence[str], options: Sequence[str], threads: int) -> None:
    """Run it within `work`: MMseqs2's own scripts stumble over a space in a path, so they see names alone.

    Raises UserError if it fails, TransientError if that is for a full disk.
    """
    done = subprocess.run(
        ["mmseqs", command, *files, "tmp", *options, "--threads", str(threads), "-v", "1"],
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        close_fds=False,  # MMseqs2 inherits the lock's, and so holds it
    )
    if done.returncode:
        last = (done.stdout.strip() or "it says nothing").splitlines()[-1]
        told = f"mmseqs {command} failed with exit code {done.returncode}: {last}"
        if shutil.disk_usage(work).free < NEARLY_FULL:  # of which MMseqs2's last line need not tell
            raise TransientError(f"{work}: the disk is full ({told})")
        raise UserError(told)
    shutil.rmtree(work / "tmp")  # the next command would take up what it finds there


def _write_layout(database: sqlite3.Connection, folder: Path) -> None:
    """BioNeMo's four files; clusters and members in the order of the input."""
    members = (
        "SELECT (SELECT id FROM protein AS first WHERE first.number = cluster), id, sequence "
        "FROM member JOIN protein USING (number) WHERE {} ORDER BY cluster, number"
    )
    database.execute("CREATE INDEX in_order ON member (cluster)")  # else the sequences would be sorted too
    clusters = pa.schema({"ur50_id": pa.string(), "ur90_id": pa.list_(pa.string())})
    rows = database.execute(members.format(TRAIN))
    with _protein_table(folder / "train.db") as proteins:
        named = (
            {"ur50_id": name, "ur90_id": [_insert_protein(proteins, row) for row in group]}
            for name, group in groupby(rows, key=itemgetter(0))
        )
        _write_parquet(folder / "train_clusters.parquet", named, clusters)
    rows = database.execute(members.format(VALID))
    with _protein_table(folder / "validation.db") as proteins:
        named = ({"ur50_id": _insert_protein(proteins, row)} for row in rows)
        _write_parquet(folder / "valid_clusters.parquet", named, pa.schema({"ur50_id": pa.string()}))


@contextlib.contextmanager
def _protein_table(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE protein (id TEXT PRIMARY KEY, sequence TEXT)")
        yield database


def _insert_protein(database: sqlite3.Connection, row: tuple[str, str, str]) -> str:
    _, name, sequence = row
    database.execute("INSERT INTO protein VALUES (?, ?)", (name, sequence))
    return name


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]], schema: pa.Schema) -> None:
    with path.open("wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:  # any path will do
        while some := list(islice(rows, ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(some, schema))
