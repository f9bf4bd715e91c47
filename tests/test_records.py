"""records.py: the rules for a sequence and for the members of a cluster, and what a report counts."""

from __future__ import annotations

import contextlib
import random
import string
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from esm2_composer.conversion.records import LENGTH_LABELS, Report, build_record, choose_members, clean


def assert_same_records(records: list[dict[str, Any]], expected: list[tuple[str, list[bytes]]]) -> None:
    for record, (cluster_id, members) in zip(records, expected, strict=True):
        assert set(record) == {"cluster_id", "lengths", "residues"}
        assert record["cluster_id"] == cluster_id
        assert record["lengths"].dtype == np.int32
        assert record["lengths"].tolist() == [len(member) for member in members]
        assert type(record["residues"]) is bytes
        assert record["residues"] == b"".join(members)


def build(cluster_id: str, members: list[tuple[str, bytes | None]], report: Report) -> dict[str, Any] | None:
    """`build_record` after `choose_members`, with one sequence under each id."""
    sequences = dict(members)
    chosen = choose_members(cluster_id, [name for name, _ in members], report)
    return build_record(cluster_id, [(name, [sequences[name]]) for name in chosen], report)


def told(report: Report, table: str) -> dict[str, int]:
    return {reason: entry["count"] for reason, entry in report.as_dict()[table].items()}


def test_building_records_imports_neither_streaming_nor_arrow() -> None:
    code = """
import sys
import esm2_composer.conversion.records
print({"streaming", "torch", "pyarrow", "duckdb"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


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


# --- choose_members ---


@pytest.mark.parametrize("named", [["b", "a"], ["a", "b"], ["b", "a", "b", "a", "a"]])
def test_members_come_once_in_the_order_of_their_ids(named: list[str]) -> None:
    report = Report()
    assert choose_members("c", named, report) == ["a", "b"]
    assert report.counts["members_read"] == len(named)
    assert told(report, "changed") == ({"member named again in its cluster": 3} if len(named) == 5 else {})
    assert report.counts["members_rejected"] == 0


@pytest.mark.parametrize("nothing", [None, ""])
def test_members_without_id_are_rejected(nothing: str | None) -> None:
    report = Report()
    assert choose_members("c", [nothing, "a", nothing], report) == ["a"]
    assert report.rejected == {"member without id": {"count": 2, "examples": ["c", "c"]}}
    assert report.counts["members_rejected"] == 2
    assert choose_members("d", [nothing], Report()) == []


def test_members_that_another_cluster_keeps_are_rejected() -> None:
    report = Report()
    assert choose_members("c", ["a", "b", "a"], report, owned_elsewhere=["a"]) == ["b"]
    assert choose_members("d", ["e"], report, owned_elsewhere=["e"]) == []
    assert report.rejected["member of another cluster"] == {"count": 2, "examples": ["a", "e"]}


def test_members_above_the_limit_are_left_out_at_random_whatever_their_order() -> None:
    ids = [f"m{number:03}" for number in range(200)]
    report = Report()
    chosen = choose_members("c", ids, report, limit=50, seed=1)
    assert len(chosen) == 50
    assert chosen == sorted(chosen)
    assert report.counts["members_left_out"] == 150
    assert report.counts["members_rejected"] == 0
    assert told(report, "changed") == {"cluster cut to the member limit": 1}
    shuffled = random.Random(0).sample(ids, len(ids))
    assert choose_members("c", shuffled, Report(), limit=50, seed=1) == chosen
    assert choose_members("c", ids, Report(), limit=50, seed=2) != chosen
    assert choose_members("c", ids[:50], Report(), limit=50, seed=1) == ids[:50]


def test_the_limit_prefers_no_member() -> None:
    """Of 40 members, 10 kept: over 400 seeds each is kept 100 times, give or take 5 standard deviations of 8.7."""
    ids = [f"m{number}" for number in range(40)]
    kept = [member for seed in range(400) for member in choose_members("c", ids, Report(), limit=10, seed=seed)]
    counts = [kept.count(member) for member in ids]
    assert 57 <= min(counts) <= max(counts) <= 143


# --- build_record and Report ---


def test_record_holds_the_usable_members_end_to_end() -> None:
    report = Report()
    record = build("c", [("d", b"mkv*"), ("a", b"MK"), ("b", b"M-K"), ("gone", None)], report)
    assert record is not None
    assert_same_records([record], [("c", [b"MK", b"MKV"])])
    assert report.as_dict()["rejected"] == {
        "bad residue": {"count": 1, "examples": ["b"]},
        "member without sequence": {"count": 1, "examples": ["gone"]},
    }
    assert told(report, "changed") == {"lower case made upper": 1, "final * dropped": 1}
    assert report.counts["members_rejected"] == 2


def test_cluster_with_no_usable_member_is_rejected_beside_its_members() -> None:
    report = Report()
    assert build("c", [("a", b"*"), ("b", None)], report) is None
    assert report.as_dict()["rejected"] == {
        "empty sequence": {"count": 1, "examples": ["a"]},
        "member without sequence": {"count": 1, "examples": ["b"]},
        "cluster with no usable member": {"count": 1, "examples": ["c"]},
    }
    assert report.counts["members_rejected"] == 2


@pytest.mark.parametrize("other", [b"MKJ", b"mkj", b" MKX\n", b"MKX*"])
def test_sequences_that_clean_to_the_same_are_one(other: bytes) -> None:
    for given in ([b"MKX", other], [other, b"MKX"]):  # what is told does not depend on the order
        report = Report()
        assert build_record("c", [("a", given)], report)["residues"] == b"MKX"
        assert told(report, "changed") == {"sequence given again": 1}
        assert not report.rejected


@pytest.mark.parametrize("other", [b"MKV", b"M-K", b""])
def test_different_sequences_under_one_id_are_rejected(other: bytes) -> None:
    report = Report()
    record = build_record("c", [("a", [b"MKX", other]), ("b", [b"ML"])], report)
    assert record["residues"] == b"ML"
    assert report.rejected == {"different sequences under one id": {"count": 1, "examples": ["a"]}}
    assert report.counts["members_rejected"] == 1


def test_an_empty_entry_beside_a_sequence_does_not_count() -> None:
    report = Report()
    assert build_record("c", [("a", [None, b"MK"])], report)["residues"] == b"MK"
    assert not report.changed
    assert not report.rejected


def test_a_sequence_that_is_not_text_is_rejected() -> None:
    report = Report()
    assert build_record("c", [("a", [12])], report) is None
    assert told(report, "rejected")["sequence is not text"] == 1


def test_a_protein_of_35000_residues_is_kept_whole() -> None:
    report = Report()
    record = build_record("c", [("titin", [b"M" * 35_000])], report)
    assert record["lengths"].tolist() == [35_000]
    assert record["residues"] == b"M" * 35_000


CLUSTERS = [("c", [("a", b"MK"), ("b", b"M1")]), ("d", []), ("e", [("f", None)]), ("g", [("h", b"mkV")])]


def test_report_adds_up_over_clusters_however_they_are_parted() -> None:
    whole = Report()
    for cluster in CLUSTERS:
        build(*cluster, whole)
    counts = whole.as_dict()
    assert (counts["clusters_read"], counts["clusters_written"]) == (4, 2)
    assert (counts["members_read"], counts["members_written"], counts["members_rejected"]) == (4, 2, 2)
    assert counts["residues_written"] == 5
    for cut in range(5):
        parts = [Report(), Report()]
        for number, cluster in enumerate(CLUSTERS):
            build(*cluster, parts[number >= cut])
        merged = Report()
        for part in parts:
            merged.merge(Report.from_dict(part.as_dict()))
        assert {**counts, **merged.as_dict()} == counts


def test_changes_are_counted_by_member_and_only_of_members_written() -> None:
    report = Report()
    members = [b"mkj", b"MJJ", b"m-k", b"MK"]
    build("c", [(str(index), raw) for index, raw in enumerate(members)], report)
    assert report.as_dict()["changed"] == {
        "lower case made upper": {"count": 1, "examples": ["0"]},
        "J made X": {"count": 2, "examples": ["0", "1"]},
    }


def test_examples_stop_at_20_and_the_count_does_not() -> None:
    parts = [Report(), Report()]
    for cluster in range(10):
        build(f"c{cluster}", [(f"m{cluster}{member}", b"M1") for member in range(5)], parts[cluster // 5])
    names = [f"m{cluster}{member}" for cluster in range(5) for member in range(5)]
    assert parts[0].rejected["bad residue"] == {"count": 25, "examples": names[:20]}
    merged = Report()
    for part in parts:
        merged.merge(part)
    assert merged.rejected["bad residue"] == {"count": 50, "examples": names[:20]}
    assert len(merged.rejected["cluster with no usable member"]["examples"]) == 10


@pytest.mark.parametrize(
    ("length", "label"),
    [
        *[(1, "1-50"), (50, "1-50"), (51, "51-100"), (1022, "751-1022"), (1023, "1023-1500")],
        *[(5000, "2001-5000"), (5001, "5001-"), (40_000, "5001-")],
    ],
)
def test_length_falls_into_its_bin(length: int, label: str) -> None:
    report = Report()
    build("c", [("a", b"M" * length)], report)
    histogram = report.as_dict()["member_lengths"]
    assert list(histogram) == LENGTH_LABELS
    assert {name: count for name, count in histogram.items() if count} == {label: 1}
