"""layouts.py: what each layout yields, and that a file which is not what it should be is one clear line."""

from __future__ import annotations

import contextlib
import gzip
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_data import write_clusters, write_layout, write_proteins

from esm2_composer.conversion.fasta import read_fasta
from esm2_composer.conversion.layouts import BioNeMo, Fasta, Flat, Layout, read_flat, reading
from esm2_composer.conversion.plan import make_plan
from esm2_composer.conversion.proteins import Sequences
from esm2_composer.conversion.records import Report
from esm2_composer.errors import TransientError, UserError


def rows(layout: Layout, scratch: Path) -> list[tuple[str | None, list[str | None]]]:
    """(cluster id, member ids) of every row of the layout's view, in any order."""
    scratch.mkdir(exist_ok=True)
    layout.stage(scratch, Report(), lambda read: None)
    database = duckdb.connect()
    layout.view(database, scratch)
    return database.execute("SELECT cluster_id, member_ids FROM named ORDER BY ALL").fetchall()


def sequences(layout: Layout, scratch: Path, ids: list[str]) -> dict[str, list]:
    scratch.mkdir(exist_ok=True)
    path = layout.stage(scratch, Report(), lambda read: None)
    return {name.decode(): found for name, found in Sequences(path).look_up(ids).items()}


# --- BioNeMo ---


def test_training_clusters_go_by_their_id_or_their_first_member(tmp_path: Path) -> None:
    columns = {"ur50_id": ["c1", None, ""], "ur90_id": [["b", "a"], ["d", "e"], [None, "f"]], "size": [2, 2, 2]}
    layout = BioNeMo(*write_layout(tmp_path, columns, {}))
    assert rows(layout, tmp_path) == [("c1", ["b", "a"]), ("d", ["d", "e"]), ("f", [None, "f"])]


def test_training_clusters_need_no_ids_of_their_own(tmp_path: Path) -> None:
    layout = BioNeMo(*write_layout(tmp_path, {"ur90_id": [["b", "a"], ["c"], [], None]}, {}))
    assert rows(layout, tmp_path) == [("b", ["b", "a"]), ("c", ["c"]), (None, []), (None, [])]


def test_validation_clusters_are_their_only_member(tmp_path: Path) -> None:
    layout = BioNeMo(*write_layout(tmp_path, {"ur50_id": ["b", "a", None]}, {"a": "MA"}))
    assert rows(layout, tmp_path) == [("a", ["a"]), ("b", ["b"]), (None, [None])]
    assert sequences(layout, tmp_path, ["a", "b"]) == {"a": [b"MA"]}


@pytest.mark.parametrize("text", [pa.string(), pa.large_string()], ids=str)
@pytest.mark.parametrize("list_of", [pa.list_, pa.large_list])
def test_large_types_read_as_plain_ones(tmp_path: Path, text: pa.DataType, list_of: Any) -> None:
    columns = {"ur50_id": pa.array(["c"], text), "ur90_id": pa.array([["a", "b"]], list_of(text))}
    paths = write_layout(tmp_path, columns, {})
    stored = pq.read_schema(paths[0])
    assert [stored.field(name).type for name in columns] == [text, list_of(text)]
    assert rows(BioNeMo(*paths), tmp_path) == [("c", ["a", "b"])]


def test_ids_and_paths_may_hold_any_text(tmp_path: Path) -> None:
    folder = tmp_path / "a b#c?d%41*[x]"
    folder.mkdir()
    columns = {"ur50_id": ["Grün"], "ur90_id": [["é'\"", "%_"]]}
    layout = BioNeMo(*write_layout(folder, columns, {"é'\"": "MÉ", "%_": "mk*"}))
    assert rows(layout, folder) == [("Grün", ["é'\"", "%_"])]
    assert sequences(layout, folder, ["é'\"", "%_"]) == {"é'\"": ["MÉ".encode()], "%_": [b"mk*"]}


# --- Flat ---


@pytest.mark.parametrize("text", [pa.string(), pa.large_string()], ids=str)
def test_flat_rows_come_from_every_file_of_a_folder(tmp_path: Path, text: pa.DataType) -> None:
    (tmp_path / "flat" / "more").mkdir(parents=True)
    for name, columns in {
        "b.parquet": {"ur50_id": ["c1", None], "ur90_id": ["a", "b"], "sequence": ["MA", "MB"]},
        "more/a.parquet": {"ur50_id": ["c1", "c2"], "ur90_id": ["d", "a"], "sequence": [None, "ma"]},
    }.items():
        arrays = {key: pa.array(values, text) for key, values in columns.items()}
        write_clusters(tmp_path / "flat" / name, {"more": [1, 2], **arrays})
    (tmp_path / "flat" / "README").write_text("not a table")
    layout = Flat(tmp_path / "flat")
    assert rows(layout, tmp_path) == [("c1", ["a"]), ("c1", ["d"]), ("c2", ["a"]), (None, ["b"])]
    found = sequences(layout, tmp_path, ["a", "b", "d", "e"])
    assert {name: sorted(given, key=str) for name, given in found.items()} == {
        "a": [b"MA", b"ma"],
        "b": [b"MB"],
        "d": [None],
    }


def write_flat(path: Path, member: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_clusters(path, {"ur50_id": ["c"], "ur90_id": [member], "sequence": ["MK"]})


def test_links_are_followed_and_what_is_hidden_is_not_read(tmp_path: Path) -> None:
    for member, place in enumerate(("flat/a.parquet", "disk2/more/b.parquet", "flat/c.parquet/part-0.parquet")):
        write_flat(tmp_path / place, str(member))
    (tmp_path / "flat/z_link").symlink_to(tmp_path / "disk2")
    (tmp_path / "disk2/loop").symlink_to(tmp_path / "flat")
    (tmp_path / "flat/again").symlink_to(tmp_path / "disk2/more")
    for place in ("flat/._a.parquet", "flat/_temporary/0/a.parquet", "flat/.train.work/plan.parquet"):
        write_flat(tmp_path / place, "hidden")
    found = Flat(tmp_path / "flat").inputs["flat"]
    places = ["a.parquet", "again/b.parquet", "c.parquet/part-0.parquet"]
    assert [str(path.relative_to(tmp_path / "flat")) for path in found] == places


def test_long_rows_of_parquet_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    rows = 4000
    columns = {"ur90_id": [f"m{row}" for row in range(rows)], "sequence": ["MKVLA" * 5000] * rows}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", use_dictionary=False, compression="none")
    before = pa.default_memory_pool().bytes_allocated()
    peak = max(pa.default_memory_pool().bytes_allocated() for _ in read_flat(tmp_path / "x.parquet"))
    assert peak - before < 0.7 * (tmp_path / "x.parquet").stat().st_size


# --- FASTA ---

FASTA = b">a first protein\nMK\nV\n\n>b\nMK\n>c no sequence\n>\nML\n>d\tx>y\nM K*"


def test_headers_of_uniprot_go_by_their_accession(tmp_path: Path) -> None:
    headers = b"sp|P12345|AATM_RABIT Aspartate", b"tr|Q9-2|X", b"UniRef90_P1 n=1", b"gi|1|x", b"sp|P1"
    (tmp_path / "f").write_bytes(b"".join(b">" + header + b"\nMK\n" for header in headers))
    assert [name for name, _ in read_fasta(tmp_path / "f")] == ["P12345", "Q9-2", "UniRef90_P1", "gi|1|x", "sp|P1"]
    (tmp_path / "t").write_bytes(b"sp|P12345|AATM_RABIT\ttr|Q9-2|X\nUniRef90_P1\tsp|P1\n")
    layout = Fasta([tmp_path / "f"], tmp_path / "t")
    assert rows(layout, tmp_path) == [("P12345", ["Q9-2"]), ("UniRef90_P1", ["sp|P1"])]


def test_fasta_alone_makes_every_sequence_a_cluster(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(FASTA)
    (tmp_path / "g").write_bytes(b">e\nMK\n>a\nMKV\n")
    layout, report = Fasta([tmp_path / "f", tmp_path / "g"]), Report()
    assert rows(layout, tmp_path) == [(name, [name]) for name in "aabcde"]
    layout.stage(tmp_path, report, lambda read: None)
    assert report.counts["sequences_read"] == 6
    assert report.rejected == {"header without id": {"count": 1, "examples": ["record 4 of f"]}}
    assert sequences(layout, tmp_path, ["a", "c"]) == {"a": [b"MKV", b"MKV"], "c": [b""]}


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"], ids=["unix", "windows"])
def test_tsv_lines_are_members_of_representatives(tmp_path: Path, line_end: bytes) -> None:
    (tmp_path / "f").write_bytes(FASTA)
    (tmp_path / "t").write_bytes(b"a\tb\n\"a\ta'c\n\nd\t\n\te\nd\td\n".replace(b"\n", line_end))
    layout = Fasta([tmp_path / "f"], tmp_path / "t")
    assert rows(layout, tmp_path) == [('"a', ["a'c"]), ("a", ["b"]), ("d", ["d"]), ("d", [None]), (None, ["e"])]


def test_spaces_around_the_ids_of_a_tsv_are_none_of_them(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(FASTA)
    (tmp_path / "t").write_bytes(b" a \t sp|P1|X \n \t b\n")
    assert rows(Fasta([tmp_path / "f"], tmp_path / "t"), tmp_path) == [("a", ["P1"]), (None, ["b"])]


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_a_compressed_tsv_is_told_by_its_content_and_read_whole_or_refused(tmp_path: Path, codec: str) -> None:
    pairs = [(f"c{number}", f"m{number * 7919 % 100_003}") for number in range(50_000)]
    plain = "".join(f"{cluster}\t{member}\n" for cluster, member in pairs).encode()
    packed = gzip.compress(plain) if codec == "gzip" else pa.compress(plain, codec, asbytes=True)
    (tmp_path / "f").write_bytes(FASTA)
    for name, content in (("packed.tsv", packed), ("plain.tsv.gz", plain), ("plain.tsv.zst", plain)):
        (tmp_path / name).write_bytes(content)
        layout = Fasta([tmp_path / "f"], tmp_path / name)
        assert rows(layout, tmp_path / "scratch") == sorted((cluster, [member]) for cluster, member in pairs)
    for keep in (0.5, 0.75, 0.999):
        (tmp_path / "t.tsv.gz").write_bytes(broken(packed, keep))
        with pytest.raises(UserError, match=r"t\.tsv\.gz: damaged or cut short"):
            rows(Fasta([tmp_path / "f"], tmp_path / "t.tsv.gz"), tmp_path / "scratch")


# --- what is refused ---


def broken(content: bytes, keep: float) -> bytes:
    return content[: int(len(content) * keep)]


PARQUET = {"ur50_id": ["c"], "ur90_id": ["a"], "sequence": ["M"]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: Flat(f / "gone"), "gone: no such file"),
        (lambda f: Flat(f), "no .parquet file in this folder"),
        (
            lambda f: Flat(write_clusters(f / "x.parquet", {"ur50_id": ["c"], "ur90_id": ["a"]})),
            "no column 'sequence'; it has ur50_id, ur90_id",
        ),
        (
            lambda f: Flat(write_clusters(f / "x.parquet", {**PARQUET, "ur90_id": [["a"]]})),
            "column 'ur90_id' is list<element: string>; it must be a string",
        ),
        (
            lambda f: Flat(write_clusters(f / "x.parquet", {**PARQUET, "Sequence": ["MK"]})),
            "x.parquet: the columns sequence, Sequence have one name, but for case; keep one",
        ),
        (lambda f: Flat(f / "\udcff"), r"\udcff: its path is not UTF-8"),
        (lambda f: Fasta([f]), "not a regular file"),
        (lambda f: Fasta([f / "gone"]), "gone: no such file"),
        (lambda f: Fasta([write_proteins(f / "x", {})], f / "gone"), "gone: no such file"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make(tmp_path)
    assert message in str(caught.value)


GENES = {"ur50_id": ["a", "b", "c"], "ur90_id": ["a", "b", "c"], "sequence": ["ACGTN" * 80, None, "MKV"]}


def test_nucleotides_in_parquet_are_refused_and_few_of_them_are_not(tmp_path: Path) -> None:
    write_clusters(tmp_path / "x.parquet", GENES)
    with pytest.raises(UserError, match=r"x\.parquet: looks like nucleotides \(99 % A, C, G, T, U or N\)"):
        Flat(tmp_path / "x.parquet")
    Flat(write_clusters(tmp_path / "few.parquet", {**GENES, "sequence": ["ACGT" * 70, None, "MKV"]}))


def test_nucleotides_in_sqlite_are_refused_whatever_else_is_there(tmp_path: Path) -> None:
    clusters = write_clusters(tmp_path / "c.parquet", {"ur50_id": ["a"]})
    with contextlib.closing(sqlite3.connect(tmp_path / "p.db")) as database, database:
        database.execute("CREATE TABLE protein (id TEXT PRIMARY KEY, sequence)")
        database.executemany("INSERT INTO protein VALUES (?, ?)", [("a", "ACGT" * 60), ("b", None), ("c", 5)])
    BioNeMo(clusters, tmp_path / "p.db")  # so few letters may be anything
    with contextlib.closing(sqlite3.connect(tmp_path / "p.db")) as database, database:
        database.execute("INSERT INTO protein VALUES ('d', ?)", ("NNNN" * 20,))
    with pytest.raises(UserError, match=r"p\.db: looks like nucleotides \(100 % A, C, G, T, U or N\)"):
        BioNeMo(clusters, tmp_path / "p.db")


NO_TEXT = pa.array([b"M\xff"]).view(pa.string())


def test_text_that_is_none_is_damage(tmp_path: Path) -> None:
    """Arrow takes the bytes of a string for granted until somebody looks at them."""
    ids = [str(number) for number in range(2000)]  # what comes first is looked at at once
    late = pa.array([b"M"] * 1999 + [b"M\xff"]).view(pa.string())
    layout = Flat(write_clusters(tmp_path / "x.parquet", {"ur50_id": ids, "ur90_id": ids, "sequence": late}))
    with pytest.raises(UserError, match=r"x\.parquet: damaged \('utf-8' codec can't decode"):
        layout.stage(tmp_path, Report(), lambda read: None)
    write_clusters(tmp_path / "x.parquet", {**PARQUET, "sequence": NO_TEXT})
    with pytest.raises(UserError, match=r"x\.parquet: damaged \('utf-8' codec can't decode"):
        Flat(tmp_path / "x.parquet")
    layout = BioNeMo(*write_layout(tmp_path, {"ur50_id": NO_TEXT}, {}))
    with pytest.raises(UserError, match=r"clusters\.parquet: damaged"):
        make_plan(layout, tmp_path, None, 1, Report())
    pq.write_table(pa.table(PARQUET), tmp_path / "y.parquet", store_schema=False)
    named = (tmp_path / "y.parquet").read_bytes()
    (tmp_path / "y.parquet").write_bytes(named.replace(b"sequence", b"sequenc\xff"))
    with pytest.raises(UserError, match=r"y\.parquet: not a parquet file \('utf-8' codec can't decode"):
        Flat(tmp_path / "y.parquet")


def test_checksums_of_parquets_pages_are_looked_at(tmp_path: Path) -> None:
    columns = {name: pa.array(values) for name, values in {**PARQUET, "sequence": ["MKVLAW"]}.items()}
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table(columns),
        path,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    Flat(path)
    assert path.read_bytes().count(b"MKVLAW") == 1
    path.write_bytes(path.read_bytes().replace(b"MKVLAW", b"MKVLAY"))
    with pytest.raises(UserError, match=r"x\.parquet: damaged \(.*CRC checksum"):
        Flat(path)


def test_a_database_that_is_locked_is_no_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_layout(tmp_path, {"ur50_id": ["a"]}, {"a": "MK"})
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, timeout=0))
    with contextlib.closing(sqlite3.connect(paths[1])) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(TransientError, match=r"proteins\.db: cannot be read \(database is locked\)"):
            BioNeMo(*paths)
    BioNeMo(*paths)


def test_a_disk_that_fails_is_no_damage_and_a_wrong_length_is(tmp_path: Path) -> None:
    with pytest.raises(duckdb.IOException), reading(tmp_path):
        raise duckdb.IOException("IO Error: Could not read from file: Input/output error")
    with pytest.raises(UserError, match="damaged"), reading(tmp_path):
        raise duckdb.IOException("IO Error: Could not read enough bytes from file")  # DuckDB raises that


def test_ctrl_c_in_a_query_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), reading(tmp_path):
        raise RuntimeError("Query interrupted")  # DuckDB raises that
