"""records.py: rules for a sequence, what a conversion counts, the BioNeMo reader, and the shards written."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REAL_DATA
from streaming import StreamingDataset

from esm2_composer.errors import UserError
from esm2_composer.records import BioNeMo, RawCluster, Report, build_record, clean, write_split

SPLIT_FILES = {
    "train": ("train_clusters.parquet", "train.db"),
    "valid": ("valid_clusters.parquet", "validation.db"),
}
LENGTH_LABELS = ["1-50", "51-100", "101-200", "201-300", "301-400", "401-500", "501-750", "751-1022", "1023-1500"]
LENGTH_LABELS += ["1501-2000", "2001-5000", "5001-"]
# Clusters, members, residues and lengths, by the README of each set.
REAL_COUNTS = {
    ("tiny", "train"): (312, 461, 129_220, [11, 45, 116, 134, 81, 62, 1, 2, 5, 3, 1, 0]),
    ("tiny", "valid"): (40, 40, 11_349, [0, 7, 10, 10, 9, 2, 0, 0, 2, 0, 0, 0]),
    ("full", "train"): (
        *(61_597, 81_142, 38_713_603),
        [1071, 5342, 14081, 13291, 12985, 9084, 12659, 5827, 4031, 1409, 1252, 110],
    ),
    ("full", "valid"): (1_946, 1_946, 947_693, [32, 141, 336, 299, 278, 220, 313, 152, 105, 40, 27, 3]),
}


def write_layout(
    folder: Path, columns: dict[str, Any], proteins: dict[str, str | None], row_group_size: int | None = None
) -> tuple[Path, Path]:
    """Write a parquet of clusters with `columns`, and an SQLite file of `proteins`; returns their paths."""
    clusters, sequences = folder / "clusters.parquet", folder / "proteins.db"
    pq.write_table(pa.table(columns), clusters, row_group_size=row_group_size)
    with contextlib.closing(sqlite3.connect(sequences)) as database, database:
        database.execute("CREATE TABLE protein (id TEXT PRIMARY KEY, sequence TEXT)")
        database.executemany("INSERT INTO protein VALUES (?, ?)", proteins.items())
    return clusters, sequences


def read_layout(folder: Path, columns: dict[str, Any], proteins: dict[str, str | None]) -> list[RawCluster]:
    return list(BioNeMo(*write_layout(folder, columns, proteins)))


def read_split(split: Path) -> list[dict[str, Any]]:
    dataset = StreamingDataset(local=str(split), batch_size=1, validate_hash="xxh64")
    return [dataset[index] for index in range(len(dataset))]


def assert_same_records(records: list[dict[str, Any]], expected: list[tuple[str, list[bytes]]]) -> None:
    for record, (cluster_id, members) in zip(records, expected, strict=True):
        assert set(record) == {"cluster_id", "lengths", "residues"}
        assert record["cluster_id"] == cluster_id
        assert record["lengths"].dtype == np.int32
        assert record["lengths"].tolist() == [len(member) for member in members]
        assert type(record["residues"]) is bytes
        assert record["residues"] == b"".join(members)


def real_paths(name: str, split: str) -> tuple[Path, Path]:
    clusters, sequences = (REAL_DATA / name / file for file in SPLIT_FILES[split])
    if not (clusters.exists() and sequences.exists()):
        pytest.skip(
            f"no real data in {REAL_DATA / name}; ESM2_REAL_DATA names the folder that holds tiny/ and full/"
        )
    return clusters, sequences


# --- clean ---


@pytest.mark.parametrize(
    ("raw", "residues", "changes"),
    [
        (b"ACDEFGHIKLMNPQRSTVWY", b"ACDEFGHIKLMNPQRSTVWY", []),
        (b"MXBUZO", b"MXBUZO", []),
        (b" M\tK\r\nV\vL\f", b"MKVL", ["white space removed"]),
        (b"mKvxbuzo", b"MKVXBUZO", ["lower case made upper"]),
        (b"MKV*", b"MKV", ["final * dropped"]),
        (b"MJKJ", b"MXKX", ["J made X"]),
        (b"j", b"X", ["lower case made upper", "J made X"]),
        (b"mk j* \n", b"MKX", ["white space removed", "lower case made upper", "final * dropped", "J made X"]),
    ],
)
def test_clean_applies_each_rule_and_names_it(raw: bytes, residues: bytes, changes: list[str]) -> None:
    cleaned, made = clean(raw)
    assert cleaned == residues
    assert sorted(made) == sorted(changes)


@pytest.mark.parametrize("raw", ["MK*V", "*MK", "MK**", "MK-V", "MK.V", "MK1", "MÉK", "M\xa0K", "M\0K", ">a"])
def test_clean_rejects_what_is_no_residue(raw: str) -> None:
    with pytest.raises(ValueError, match=r"^bad residue$"):
        clean(raw.encode())


@pytest.mark.parametrize("raw", [b"", b" \n\t", b"*", b" *\n"])
def test_clean_rejects_what_is_empty(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"^empty sequence$"):
        clean(raw)


def test_clean_accepts_letters_and_white_space_within_a_sequence_and_no_other_byte() -> None:
    accepted = set()
    for byte in range(256):
        with contextlib.suppress(ValueError):
            clean(b"M" + bytes([byte]) + b"K")
            accepted.add(byte)
    assert accepted == set((string.ascii_letters + string.whitespace).encode())


# --- build_record and Report ---


def test_record_holds_the_usable_members_end_to_end() -> None:
    report = Report()
    record = build_record(("c", [("a", b"MK"), ("b", b"M-K"), ("gone", None), ("d", b"mkv*")]), report)
    assert record is not None
    assert_same_records([record], [("c", [b"MK", b"MKV"])])
    told = report.as_dict()
    assert told["rejected"] == {
        "bad residue": {"count": 1, "examples": ["b"]},
        "member without sequence": {"count": 1, "examples": ["gone"]},
    }
    assert told["changed"] == {"lower case made upper": 1, "final * dropped": 1}
    assert report.rejected_fraction == 0.5


def test_cluster_without_members_is_rejected_by_its_id() -> None:
    report = Report()
    assert build_record(("c", []), report) is None
    assert report.as_dict()["rejected"] == {"cluster without members": {"count": 1, "examples": ["c"]}}
    assert report.rejected_fraction == 0


def test_cluster_with_no_usable_member_is_rejected_beside_its_members() -> None:
    report = Report()
    assert build_record(("c", [("a", b"*"), ("b", None)]), report) is None
    assert report.as_dict()["rejected"] == {
        "empty sequence": {"count": 1, "examples": ["a"]},
        "member without sequence": {"count": 1, "examples": ["b"]},
        "cluster with no usable member": {"count": 1, "examples": ["c"]},
    }
    assert report.rejected_fraction == 1


def test_report_adds_up_over_clusters() -> None:
    report = Report()
    for cluster in [("c", [("a", b"MK"), ("b", b"M1")]), ("d", []), ("e", [("f", None)]), ("g", [("h", b"MKV")])]:
        build_record(cluster, report)
    told = report.as_dict()
    assert (told["clusters_read"], told["clusters_written"]) == (4, 2)
    assert (told["members_read"], told["members_written"]) == (4, 2)
    assert told["residues_written"] == 5
    assert report.rejected_fraction == 0.5


def test_changes_are_counted_by_member_and_only_of_members_written() -> None:
    report = Report()
    members = [b"mkj", b"MJJ", b"m-k", b"MK"]
    build_record(("c", [(str(index), raw) for index, raw in enumerate(members)]), report)
    assert report.as_dict()["changed"] == {"lower case made upper": 1, "J made X": 2}


def test_examples_stop_at_20_and_the_count_does_not() -> None:
    report = Report()
    for cluster in range(5):
        build_record((f"c{cluster}", [(f"m{cluster}{member}", b"M1") for member in range(5)]), report)
    names = [f"m{cluster}{member}" for cluster in range(5) for member in range(5)]
    assert report.as_dict()["rejected"]["bad residue"] == {"count": 25, "examples": names[:20]}


@pytest.mark.parametrize(
    ("length", "label"),
    [
        *[(1, "1-50"), (50, "1-50"), (51, "51-100"), (1022, "751-1022"), (1023, "1023-1500")],
        *[(5000, "2001-5000"), (5001, "5001-"), (40_000, "5001-")],
    ],
)
def test_length_falls_into_its_bin(length: int, label: str) -> None:
    report = Report()
    build_record(("c", [("a", b"M" * length)]), report)
    histogram = report.as_dict()["member_lengths"]
    assert list(histogram) == LENGTH_LABELS
    assert {name: count for name, count in histogram.items() if count} == {label: 1}


def test_nothing_read_is_nothing_rejected() -> None:
    assert Report().rejected_fraction == 0


# --- BioNeMo ---


def test_training_layout_names_clusters_by_ur50_id(tmp_path: Path) -> None:
    columns = {"ur50_id": ["c1", "c2"], "ur90_id": [["b", "a"], ["gone"]], "size": [2, 1]}
    clusters = read_layout(tmp_path, columns, {"a": "MA", "b": "MB", "unused": "MK"})
    assert clusters == [("c1", [("b", b"MB"), ("a", b"MA")]), ("c2", [("gone", None)])]


def test_training_layout_without_ur50_id_names_clusters_by_their_first_member(tmp_path: Path) -> None:
    clusters = read_layout(tmp_path, {"ur90_id": [["b", "a"], ["c"]]}, {"a": "MA", "b": "MB", "c": "MC"})
    assert clusters == [("b", [("b", b"MB"), ("a", b"MA")]), ("c", [("c", b"MC")])]


def test_validation_layout_has_one_member_a_cluster(tmp_path: Path) -> None:
    clusters = read_layout(tmp_path, {"ur50_id": ["b", "a", "gone"]}, {"a": "MA", "b": "MB"})
    assert clusters == [("b", [("b", b"MB")]), ("a", [("a", b"MA")]), ("gone", [("gone", None)])]


@pytest.mark.parametrize("text", [pa.string(), pa.large_string()], ids=str)
@pytest.mark.parametrize("list_of", [pa.list_, pa.large_list])
def test_large_types_read_as_plain_ones(tmp_path: Path, text: pa.DataType, list_of: Any) -> None:
    columns = {"ur50_id": pa.array(["c"], text), "ur90_id": pa.array([["a", "b"]], list_of(text))}
    paths = write_layout(tmp_path, columns, {"a": "MA", "b": "MB"})
    stored = pq.read_schema(paths[0])
    assert [stored.field(name).type for name in columns] == [text, list_of(text)]
    assert list(BioNeMo(*paths)) == [("c", [("a", b"MA"), ("b", b"MB")])]


def test_null_list_null_sequence_and_empty_list_are_read_as_absent(tmp_path: Path) -> None:
    columns = {"ur50_id": ["c1", "c2", "c3"], "ur90_id": [None, ["a", "b"], []]}
    clusters = read_layout(tmp_path, columns, {"a": None, "b": "MB"})
    assert clusters == [("c1", []), ("c2", [("a", None), ("b", b"MB")]), ("c3", [])]


def test_null_ids_are_counted_as_members_without_sequence(tmp_path: Path) -> None:
    columns = {"ur50_id": ["c1", None], "ur90_id": [["a", None], ["b"]]}
    clusters = read_layout(tmp_path, columns, {"a": "MK", "b": "MV"})
    assert clusters == [("c1", [("a", b"MK"), ("null", None)]), ("b", [("b", b"MV")])]


def test_a_sequence_that_is_not_text_is_rejected() -> None:
    report = Report()
    assert build_record(("c", [("a", 12)]), report) is None
    assert report.rejected["sequence is not text"] == 1


def test_ids_and_sequences_of_any_text_come_through(tmp_path: Path) -> None:
    clusters = read_layout(
        tmp_path, {"ur50_id": ["Grün"], "ur90_id": [["é'\"", "%_"]]}, {"é'\"": "MÉ", "%_": "mk*"}
    )
    assert clusters == [("Grün", [("é'\"", "MÉ".encode()), ("%_", b"mk*")])]


def test_paths_may_hold_what_a_uri_would_escape(tmp_path: Path) -> None:
    folder = tmp_path / "a b#c?d%41"
    folder.mkdir()
    assert read_layout(folder, {"ur50_id": ["a"]}, {"a": "MA"}) == [("a", [("a", b"MA")])]


def test_a_cluster_may_have_more_members_than_a_query_has_variables(tmp_path: Path) -> None:
    ids = [f"m{index}" for index in range(250_001)]  # SQLite's limit is 32,766 as released, 250,000 in Debian
    proteins = {member: "M" + "K" * (index % 7) for index, member in enumerate(ids)}
    ((name, members),) = read_layout(tmp_path, {"ur50_id": ["c"], "ur90_id": [ids]}, proteins)
    assert name == "c"
    assert members == [(member, sequence.encode()) for member, sequence in proteins.items()]


def test_order_is_the_parquets_across_row_groups_and_batches(tmp_path: Path) -> None:
    ids = [f"m{index * 7919 % 10_000:04}" for index in range(10_000)]
    proteins = {member: "M" * (1 + index % 13) for index, member in enumerate(sorted(ids))}
    clusters = BioNeMo(*write_layout(tmp_path, {"ur90_id": [[member] for member in ids]}, proteins, 3000))
    assert len(clusters) == len(ids)
    assert list(clusters) == [(member, [(member, proteins[member].encode())]) for member in ids]


def test_reader_can_be_read_again(tmp_path: Path) -> None:
    clusters = BioNeMo(*write_layout(tmp_path, {"ur90_id": [["a"], ["b"]]}, {"a": "MA", "b": "MB"}))
    assert list(clusters) == list(clusters)
    assert len(clusters) == 2


# --- write_split ---

CLUSTERS: list[RawCluster] = [
    ("c1", [("a", b"MKV"), ("b", b"mk*"), ("bad", b"M-K")]),
    ("c2", [("gone", None)]),
    ("c3", [("d", b"MXBUZO" * 200)]),
    ("c4", []),
]
WRITTEN = [("c1", [b"MKV", b"MK"]), ("c3", [b"MXBUZO" * 200])]


def interrupted(cause: type[BaseException]) -> Iterator[RawCluster]:
    yield "lost", [("a", b"MKVLA")]
    raise cause


def test_records_come_back_as_written(tmp_path: Path) -> None:
    write_split(CLUSTERS, tmp_path / "train", {}, 0.5)
    assert_same_records(read_split(tmp_path / "train"), WRITTEN)


def test_conversion_json_says_what_was_done(tmp_path: Path) -> None:
    inputs = {"clusters": "c.parquet", "sequences": "s.db"}
    conversion = write_split(CLUSTERS, tmp_path / "train", inputs, 0.5)
    assert json.loads((tmp_path / "train" / "conversion.json").read_text()) == conversion
    assert 0 <= conversion.pop("elapsed_seconds") < 60
    assert conversion == {
        "inputs": inputs,
        "clusters_read": 4,
        "clusters_written": 2,
        "members_read": 5,
        "members_written": 3,
        "residues_written": 1205,
        "changed": {"lower case made upper": 1, "final * dropped": 1},
        "rejected": {
            "bad residue": {"count": 1, "examples": ["bad"]},
            "member without sequence": {"count": 1, "examples": ["gone"]},
            "cluster with no usable member": {"count": 1, "examples": ["c2"]},
            "cluster without members": {"count": 1, "examples": ["c4"]},
        },
        "member_lengths": dict.fromkeys(LENGTH_LABELS, 0) | {"1-50": 2, "1023-1500": 1},
    }


def test_shards_are_compressed_and_hashed(tmp_path: Path) -> None:
    write_split(CLUSTERS, tmp_path / "train", {}, 0.5)
    (shard,) = json.loads((tmp_path / "train" / "index.json").read_text())["shards"]
    assert shard["compression"] == "zstd"
    assert shard["hashes"] == ["xxh64"]
    files = {path.name for path in (tmp_path / "train").iterdir()}
    assert files == {"index.json", "conversion.json", shard["zip_data"]["basename"]}
    assert list(tmp_path.iterdir()) == [tmp_path / "train"]


def test_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "train"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_split(CLUSTERS, out, {}, 0.5)
    assert sorted(tmp_path.rglob("*")) == [out, out / "mine.txt"]
    assert (out / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("cause", [RuntimeError, KeyboardInterrupt])
def test_interrupted_split_never_has_its_name_and_a_rerun_is_whole(
    tmp_path: Path, cause: type[BaseException]
) -> None:
    out = tmp_path / "train"
    with pytest.raises(cause):
        write_split(interrupted(cause), out, {}, 0.5)
    assert not out.exists()
    write_split(CLUSTERS, out, {}, 0.5)
    assert list(tmp_path.iterdir()) == [out]
    assert_same_records(read_split(out), WRITTEN)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        write_split([("c", [("a", b"MK")])], tmp_path / "file" / "train", {}, 0.01)


def test_rejected_members_up_to_the_limit_are_accepted(tmp_path: Path) -> None:
    assert write_split(CLUSTERS, tmp_path / "train", {}, 2 / 5)["members_written"] == 3


def test_rejected_members_above_the_limit_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^40\.0% of 5 members rejected, more than 39\.0%: .*'bad'"):
        write_split(CLUSTERS, tmp_path / "train", {}, 0.39)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("clusters", "message"),
    [
        ([], "no cluster to write: the input is empty"),
        ([("c", [])], "no cluster to write: cluster without members 1 (such as 'c')"),
    ],
)
def test_nothing_to_write_leaves_nothing(tmp_path: Path, clusters: list[RawCluster], message: str) -> None:
    with pytest.raises(UserError) as caught:
        write_split(clusters, tmp_path / "train", {}, 1.0)
    assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


# --- real data ---


@pytest.mark.parametrize(("name", "split"), REAL_COUNTS)
def test_real_data_is_converted_whole(tmp_path: Path, name: str, split: str) -> None:
    conversion = write_split(BioNeMo(*real_paths(name, split)), tmp_path / split, {}, 0.0)
    clusters, members, residues, lengths = REAL_COUNTS[name, split]
    assert (conversion["clusters_read"], conversion["clusters_written"]) == (clusters, clusters)
    assert (conversion["members_read"], conversion["members_written"]) == (members, members)
    assert conversion["residues_written"] == residues
    assert conversion["member_lengths"] == dict(zip(LENGTH_LABELS, lengths, strict=True))
    assert conversion["rejected"] == conversion["changed"] == {}


@pytest.mark.parametrize("split", SPLIT_FILES)
def test_real_records_hold_the_sequences_of_the_database(tmp_path: Path, split: str) -> None:
    clusters, sequences = real_paths("tiny", split)
    write_split(BioNeMo(clusters, sequences), tmp_path / split, {}, 0.0)
    with contextlib.closing(sqlite3.connect(f"{sequences.absolute().as_uri()}?mode=ro", uri=True)) as database:
        proteins = dict(database.execute("SELECT id, CAST(sequence AS BLOB) FROM protein"))
    rows = pq.read_table(clusters).to_pylist()
    expected = [(row["ur50_id"], [proteins[key] for key in row.get("ur90_id", [row["ur50_id"]])]) for row in rows]
    assert_same_records(read_split(tmp_path / split), expected)
