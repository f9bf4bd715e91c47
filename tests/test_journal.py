"""A journal keeps whole batches of rows, whatever a kill or damage left of the others."""

import json
import os
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esm2_composer.errors import UserError
from esm2_composer.journal import _HEADER, METADATA_KEY, Journal

COLUMNS = pa.schema({"id": pa.string()})


def batch(*names: str) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"id": names})


def release(journal: Journal) -> Path:
    journal._file.close()  # as the end of its process would
    return journal.path


@pytest.mark.parametrize("lost", [0, 1, 50, 10_000])
def test_a_journal_keeps_whole_batches_and_cuts_off_the_rest(tmp_path, lost):
    journal = Journal(tmp_path / "out", COLUMNS, {"a": 1})
    journal.append(batch("x", "y"))
    whole = journal.path.stat().st_size
    journal.append(batch("z" * 100))
    path = release(journal)
    os.truncate(path, max(path.stat().st_size - lost, 0))
    again = Journal(tmp_path / "out", COLUMNS, {"a": 1})
    assert again.rows == {0: 3, 10_000: 0}.get(lost, 2)
    assert lost not in (1, 50) or path.stat().st_size == whole
    again.append(batch("last"))
    again.finish()
    expected = ["x", "y", "z" * 100, "last"]
    expected = {0: expected, 10_000: ["last"]}.get(lost, ["x", "y", "last"])
    assert pq.read_table(tmp_path / "out")["id"].to_pylist() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_journal_is_gone_on_with_where_its_inputs_have_moved(tmp_path):
    journal = Journal(tmp_path / "out", COLUMNS, {"digest": "d"}, {"fasta": "in.fasta"})
    journal.append(batch("x"))
    release(journal)
    again = Journal(tmp_path / "out", COLUMNS, {"digest": "d"}, {"fasta": "./in.fasta"})
    assert again.rows == 1
    again.append(batch("y"))
    again.finish()
    table = pq.read_table(tmp_path / "out")
    assert table["id"].to_pylist() == ["x", "y"]
    assert json.loads(table.schema.metadata[METADATA_KEY]) == {"digest": "d", "fasta": "./in.fasta"}


def test_a_journal_begun_otherwise_or_held_by_another_is_refused(tmp_path):
    journal = Journal(tmp_path / "out", COLUMNS, {"layer": 1, "model": "m"})
    journal.append(batch("x"))
    with pytest.raises(UserError, match="another process is writing"):
        Journal(tmp_path / "out", COLUMNS, {"layer": 1, "model": "m"})
    path = release(journal)
    content = path.read_bytes()
    with pytest.raises(UserError, match="layer was 1 and is 2"):
        Journal(tmp_path / "out", COLUMNS, {"layer": 2, "model": "m"})
    assert path.read_bytes() == content


def test_a_journal_damaged_in_its_middle_is_kept_and_gone_on_with(tmp_path):
    journal = Journal(tmp_path / "out", COLUMNS, {"a": 1})
    journal.append(batch("x", "y"))
    at = journal.path.stat().st_size
    for name in ("z", "last"):
        journal.append(batch(name))
    content = bytearray(journal.path.read_bytes())
    content[at : at + 64] = b"\xff" * 64
    journal.path.write_bytes(content)
    with pytest.raises(UserError, match="damaged, 2 of 4 rows can be read; the same command goes on behind these"):
        journal.finish()
    assert [path.name for path in tmp_path.iterdir()] == [journal.path.name]
    release(journal)
    again = Journal(tmp_path / "out", COLUMNS, {"a": 1})
    assert again.rows == 2
    for name in ("z", "last"):
        again.append(batch(name))
    again.finish()
    assert pq.read_table(tmp_path / "out")["id"].to_pylist() == ["x", "y", "z", "last"]


@pytest.mark.parametrize(
    "metadata", [None, {"other": "{}"}, {METADATA_KEY: "{"}, {METADATA_KEY: b"\xff\xfe{"}, {METADATA_KEY: "[]"}]
)
def test_a_journal_that_cannot_be_told_from_another_is_kept(tmp_path, metadata):
    path = tmp_path / ".out.partial"
    schema = COLUMNS.with_metadata(metadata).serialize()
    path.write_bytes(_HEADER.pack(schema.size, zlib.crc32(schema)) + schema.to_pybytes())
    content = path.read_bytes()
    with pytest.raises(UserError, match="partial: damaged; remove it"):
        Journal(tmp_path / "out", COLUMNS, {"a": 1})
    assert path.read_bytes() == content


@pytest.mark.parametrize("at", [0, 5, 8, 20])
def test_a_journal_whose_beginning_is_damaged_is_kept(tmp_path, at):
    journal = Journal(tmp_path / "out", COLUMNS, {"a": 1})
    journal.append(batch("x"))
    content = bytearray(release(journal).read_bytes())
    content[at] ^= 64
    journal.path.write_bytes(content)
    with pytest.raises(UserError, match="partial: damaged; remove it"):
        Journal(tmp_path / "out", COLUMNS, {"a": 1})
    assert journal.path.read_bytes() == content


def test_one_wrong_bit_costs_its_batch_and_those_behind(tmp_path):
    names = [f"{i:030}" for i in range(3)]
    journal = Journal(tmp_path / "out", COLUMNS, {"a": 1})
    ends = [journal.path.stat().st_size]
    for name in names:
        journal.append(batch(name))
        ends.append(journal.path.stat().st_size)
    whole = release(journal).read_bytes()
    for at in range(ends[0], ends[3], 7):
        content = bytearray(whole)
        content[at] ^= 1
        journal.path.write_bytes(content)
        again = Journal(tmp_path / "out", COLUMNS, {"a": 1})
        release(again)
        kept = [row["id"] for rows, _ in again._batches() for row in rows.to_pylist()]
        assert kept == names[: sum(end <= at for end in ends[1:])]


def test_small_batches_become_large_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("esm2_composer.journal.ROW_GROUP_BYTES", 1000)
    journal = Journal(tmp_path / "out", COLUMNS, {})
    for i in range(100):
        journal.append(batch(f"{i:050}"))
    journal.finish()
    file = pq.ParquetFile(tmp_path / "out")
    assert 4 <= file.metadata.num_row_groups <= 7
    assert file.read()["id"].to_pylist() == [f"{i:050}" for i in range(100)]
