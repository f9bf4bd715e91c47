"""The SQLite file of sequences: made in little memory, looked up by an index, or refused."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from raw_data import write_proteins

from esm2_composer.conversion import proteins
from esm2_composer.conversion.layouts import Fasta
from esm2_composer.conversion.proteins import Sequences, protein_rows
from esm2_composer.conversion.records import Report
from esm2_composer.errors import UserError


def test_what_is_staged_at_once_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proteins, "BYTES_AT_ONCE", 10)
    monkeypatch.setattr(proteins, "ROWS_AT_ONCE", 3)
    (tmp_path / "f").write_text(
        "".join(f">{i}\n{sequence}\n" for i, sequence in enumerate(["M"] * 4 + ["M" * 9] * 3))
    )
    read: list[int] = []
    path = Fasta([tmp_path / "f"]).stage(tmp_path, Report(), read.append)
    assert read == [3, 5, 7]
    assert Sequences(path).look_up(list("0123456")) == {
        **{name.encode(): [b"M"] for name in "0123"},
        **{name.encode(): [b"M" * 9] for name in "456"},
    }


def test_what_sqlite_sorts_lies_in_the_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: set[Path] = set()

    def look() -> None:
        for file in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # that of the folder itself
                opened.add(file.readlink())

    class Watched(sqlite3.Connection):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.set_progress_handler(look, 1000)

    monkeypatch.setattr(sqlite3, "connect", Watched)
    scratch = tmp_path / "it's scratch"
    scratch.mkdir()
    (tmp_path / "f").write_text("".join(f">{i:0500}\nMK\n" for i in range(5000)))
    Fasta([tmp_path / "f"]).stage(scratch, Report(), lambda read: None)
    assert {path.parent for path in opened if path.name.startswith("etilqs")} == {scratch}


def test_a_table_without_index_is_refused(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "p.db")) as database:
        database.execute("CREATE TABLE protein (id TEXT, sequence TEXT)")
        with pytest.raises(UserError, match=r"no index on 'id'.*CREATE INDEX"):
            Sequences(tmp_path / "p.db")
        database.execute("CREATE INDEX any ON protein (id)")
        assert Sequences(tmp_path / "p.db").look_up(["a"]) == {}


@pytest.mark.parametrize("lost", [1, 100, 4095, 4096])
def test_a_file_that_lacks_some_bytes_is_refused(tmp_path: Path, lost: int) -> None:
    path = write_proteins(tmp_path / "p.db", {f"m{number}": "MKV" * 20 for number in range(100)})
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(UserError, match=r"p\.db: (cut short|cannot be read as an SQLite database)"):
        Sequences(path)


VIEW = "CREATE TABLE p (id TEXT PRIMARY KEY, number INTEGER); CREATE VIEW protein AS "
TABLES = (
    "CREATE TABLE q (number INTEGER PRIMARY KEY, sequence TEXT); CREATE TABLE r (number INTEGER, sequence TEXT);"
)


@pytest.mark.parametrize(
    ("view", "indexed"),
    [
        ("SELECT id, 'M' AS sequence FROM p", True),
        ("SELECT id, 'M' AS sequence FROM p UNION ALL SELECT id, 'M' FROM p", True),
        ("SELECT id, sequence FROM p JOIN q USING (number)", True),
        ("SELECT id, sequence FROM p JOIN r USING (number)", False),
        ("SELECT id, 'M' AS sequence FROM p UNION ALL SELECT number, sequence FROM r", False),
    ],
)
def test_a_view_must_look_up_by_index_too(tmp_path: Path, view: str, indexed: bool) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "p.db")) as database, database:
        database.executescript(
            f"{TABLES} {VIEW} {view}; INSERT INTO p VALUES ('a', 1); INSERT INTO q VALUES (1, 'M')"
        )
    if indexed:
        assert Sequences(tmp_path / "p.db").look_up(["a"])[b"a"][0] == b"M"
    else:
        with pytest.raises(UserError, match="no index on 'id'"):
            Sequences(tmp_path / "p.db")
    if indexed:
        with pytest.raises(UserError, match="table 'protein' has no row numbers; is it a view"):
            protein_rows(tmp_path / "p.db")
