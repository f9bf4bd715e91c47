"""conversion.py: every layout, any number of workers and any interruption give the same shards."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REAL_DATA, ROOT
from streaming import StreamingDataset
from test_layouts import write_clusters, write_layout, write_proteins
from test_records import assert_same_records

from esm2_composer import conversion, conversion_plan, parts
from esm2_composer.conversion import Interrupted, Options, convert
from esm2_composer.conversion_plan import make_plan
from esm2_composer.destinations import LocalSplit
from esm2_composer.errors import UserError
from esm2_composer.layouts import BioNeMo, Fasta, Flat, Layout
from esm2_composer.proteins import Sequences
from esm2_composer.records import LENGTH_LABELS, Report

SPLIT_FILES = {
    "train": ("train_clusters.parquet", "train.db"),
    "valid": ("valid_clusters.parquet", "validation.db"),
}
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


def read_split(split: Path) -> list[dict[str, Any]]:
    dataset = StreamingDataset(local=str(split), batch_size=1, validate_hash="xxh64")
    return [dataset[index] for index in range(len(dataset))]


def members_of(records: list[dict[str, Any]]) -> dict[str, list[bytes]]:
    found = {}
    for record in records:
        ends = record["lengths"].cumsum()
        found[record["cluster_id"]] = [
            record["residues"][e - n : e] for e, n in zip(ends, record["lengths"], strict=True)
        ]
    return found


def in_order(clusters: dict[str, list[bytes]]) -> list[tuple[str, list[bytes]]]:
    """By the MD5 of the cluster's id, as docs/data.md says."""
    return sorted(
        clusters.items(), key=lambda item: int.from_bytes(hashlib.md5(item[0].encode()).digest(), "little")
    )


def hashes(split: Path) -> dict[str, str]:
    """Of the files of a split, without conversion.json, which tells the time, and what reading it unpacked."""
    files = [split / "index.json", split / "cluster_ids.parquet", *split.glob("*.zstd")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rejected(told: dict[str, Any]) -> dict[str, int]:
    return {reason: entry["count"] for reason, entry in told["rejected"].items()}


def changed(told: dict[str, Any]) -> dict[str, int]:
    return {reason: entry["count"] for reason, entry in told["changed"].items()}


def bionemo(folder: Path, columns: dict[str, Any], proteins: dict[str, str | None]) -> BioNeMo:
    folder.mkdir(parents=True, exist_ok=True)
    return BioNeMo(*write_layout(folder, columns, proteins))


def flat(path: Path, rows: list[tuple[str | None, str | None, str | None]]) -> Flat:
    columns = dict(zip(Flat.columns, zip(*rows, strict=True), strict=True))
    return Flat(write_clusters(path, {name: pa.array(values, pa.string()) for name, values in columns.items()}))


def random_data(clusters: int, seed: int = 0) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Members of each cluster, and their sequences."""
    rng = random.Random(seed)
    named = {
        f"c{number}": [f"m{number}_{i}" for i in range(rng.choice([1, 1, 2, 5]))] for number in range(clusters)
    }
    letters = "ACDEFGHIKLMNPQRSTVWYXBUZO"
    proteins = {
        name: "".join(rng.choices(letters, k=rng.randint(1, 60))) for ids in named.values() for name in ids
    }
    return named, proteins


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion_plan, "PART_CLUSTERS", 16)
    monkeypatch.setattr(conversion_plan, "PART_MEMBERS", 40)


# --- one canonical output ---


def test_the_same_proteins_give_the_same_shards_through_every_layout(tmp_path: Path, small_parts: None) -> None:
    named, proteins = random_data(100)
    rng = random.Random(1)
    rows = [(cluster, member, proteins[member]) for cluster, members in named.items() for member in members]
    shuffled = rng.sample(rows, len(rows))
    (tmp_path / "flat").mkdir()
    for number in range(3):
        flat(tmp_path / "flat" / f"{number}.parquet", shuffled[number::3])
    fasta = [
        f">{member} of {cluster}\n{sequence[:30]}\n{sequence[30:]}\n" for cluster, member, sequence in shuffled
    ]
    (tmp_path / "a.fasta.gz").write_bytes(gzip.compress("".join(fasta[:99]).encode()))
    (tmp_path / "b.fasta").write_text("".join(fasta[99:]))
    lines = [f"{cluster}\t{member}\n" for cluster, member, _ in rng.sample(rows, len(rows))]
    (tmp_path / "clusters.tsv").write_text("".join(lines))
    lists = {name: rng.sample(ids, len(ids)) for name, ids in rng.sample(list(named.items()), len(named))}
    columns = {"ur50_id": list(lists), "ur90_id": list(lists.values())}
    layouts: dict[str, Layout] = {
        "bionemo": bionemo(tmp_path / "bionemo", columns, proteins),
        "flat": flat(tmp_path / "flat.parquet", rows),
        "flat folder": Flat(tmp_path / "flat"),
        "fasta": Fasta([tmp_path / "a.fasta.gz", tmp_path / "b.fasta"], tmp_path / "clusters.tsv"),
    }
    told = {name: convert(layout, str(tmp_path / "out" / name), Options()) for name, layout in layouts.items()}
    expected = {name: [proteins[member].encode() for member in sorted(ids)] for name, ids in named.items()}
    assert_same_records(read_split(tmp_path / "out/bionemo/train"), in_order(expected))
    for name in layouts:
        assert hashes(tmp_path / "out" / name / "train") == hashes(tmp_path / "out/bionemo/train"), name
        assert told[name]["parts"] > 5
        assert told[name]["clusters_written"] == 100
        assert (
            told[name]["members_read"]
            == told[name]["members_written"]
            == told[name]["sequences_found"]
            == len(rows)
        )
        assert told[name]["rejected"] == told[name]["changed"] == {}


def test_fasta_alone_equals_validation_clusters(tmp_path: Path) -> None:
    _, proteins = random_data(50)
    (tmp_path / "f").write_text("".join(f">{name}\n{sequence}\n" for name, sequence in proteins.items()))
    convert(Fasta([tmp_path / "f"]), str(tmp_path / "fasta"), Options("valid"))
    layout = bionemo(tmp_path, {"ur50_id": list(proteins)}, proteins)
    convert(layout, str(tmp_path / "bionemo"), Options("valid"))
    assert hashes(tmp_path / "fasta/valid") == hashes(tmp_path / "bionemo/valid")


def test_workers_do_not_change_the_shards(tmp_path: Path, small_parts: None) -> None:
    named, proteins = random_data(120)
    layout = bionemo(tmp_path, {"ur50_id": list(named), "ur90_id": list(named.values())}, proteins)
    seen: list[tuple[str, int, int]] = []
    told = {}
    for workers in (1, 3):
        out = str(tmp_path / f"out{workers}")
        told[workers] = convert(layout, out, Options(), workers=workers, progress=lambda *args: seen.append(args))
        assert seen[-1] == ("clusters", 120, 120)
    assert hashes(tmp_path / "out1/train") == hashes(tmp_path / "out3/train")
    for conversion_json in told.values():
        del conversion_json["elapsed_seconds"]
    assert told[1] == told[3]
    assert told[1]["parts"] > 6


def test_a_part_has_at_most_32768_clusters(tmp_path: Path) -> None:
    layout = bionemo(tmp_path, {"ur50_id": [f"c{number}" for number in range(2 * 32_768 + 1)]}, {})
    plan = make_plan(layout, tmp_path, None, 1, Report())
    assert (plan.parts, plan.clusters, plan.members) == (3, 65_537, 65_537)
    groups = pq.ParquetFile(plan.path).metadata
    assert [groups.row_group(number).num_rows for number in range(3)] == [32_768, 32_768, 1]


def index_of(out: str) -> list[dict[str, Any]]:
    return json.loads((Path(out) / "train/index.json").read_text())["shards"]


def test_cluster_ids_lie_in_the_order_of_the_samples(tmp_path: Path, small_parts: None) -> None:
    named, proteins = random_data(60)
    layout = bionemo(tmp_path, {"ur50_id": list(named), "ur90_id": list(named.values())}, proteins)
    convert(layout, str(tmp_path / "out"), Options())
    ids = pq.read_table(tmp_path / "out/train/cluster_ids.parquet")["cluster_id"].to_pylist()
    assert ids == [record["cluster_id"] for record in read_split(tmp_path / "out/train")]


def test_a_part_never_cuts_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flat cluster's rows span several of the batches in which DuckDB hands out the plan."""
    monkeypatch.setattr(conversion_plan, "PART_MEMBERS", 100)
    rows = [(f"c{number % 3}", f"m{number:05}", "MK" * (1 + number % 4)) for number in range(15_000)]
    convert(flat(tmp_path / "x.parquet", rows), str(tmp_path / "out"), Options())
    assert [entry["samples"] for entry in index_of(str(tmp_path / "out"))] == [1, 1, 1]
    expected = {f"c{c}": [seq.encode() for name, _, seq in rows if name == f"c{c}"] for c in range(3)}
    assert_same_records(read_split(tmp_path / "out/train"), in_order(expected))


# --- bad input ---

MESS = {
    "lower": "mkv",
    "stop": "MKV*",
    "stop inside": "MK*V",
    "gap": "MK-V",
    "dot": "MK.V",
    "digit": "MK1V",
    "non-ASCII": "MKÉV",
    "J": "MJ",
    "rare": "MUOBZX",
    "white space": " M K\tV\n",
    "windows": "MK\r\nV\r\n",
    "empty": "",
    "null": None,
    "long": "M" * 35_000,
}
MESS_KEPT = {
    "lower": b"MKV",
    "stop": b"MKV",
    "J": b"MX",
    "rare": b"MUOBZX",
    "white space": b"MKV",
    "windows": b"MKV",
    "long": b"M" * 35_000,
}
MESS_REJECTED = {
    "bad residue": 5,
    "empty sequence": 1,
    "member without sequence": 1,
    "cluster with no usable member": 7,
}
MESS_CHANGED = {"lower case made upper": 1, "final * dropped": 1, "J made X": 1, "white space removed": 2}


@pytest.mark.parametrize("layout", ["bionemo", "flat"])
def test_every_kind_of_bad_sequence_is_kept_or_counted(tmp_path: Path, layout: str) -> None:
    if layout == "bionemo":
        source = bionemo(tmp_path, {"ur50_id": list(MESS)}, MESS)
    else:
        source = flat(tmp_path / "x.parquet", [(name, name, sequence) for name, sequence in MESS.items()])
    told = convert(source, str(tmp_path / "out"), Options(), max_reject_fraction=0.5)
    assert members_of(read_split(tmp_path / "out/train")) == {name: [seq] for name, seq in MESS_KEPT.items()}
    assert rejected(told) == MESS_REJECTED
    assert changed(told) == MESS_CHANGED
    assert sorted(told["rejected"]["bad residue"]["examples"]) == [
        "digit",
        "dot",
        "gap",
        "non-ASCII",
        "stop inside",
    ]
    assert (told["members_read"], told["members_written"], told["members_rejected"]) == (14, 7, 7)
    with pytest.raises(
        UserError, match=r"^50\.0% of 14 members rejected, more than 49\.0%: cluster with no usable"
    ):
        convert(source, str(tmp_path / "no"), Options(), max_reject_fraction=0.49)
    assert not (tmp_path / "no").exists()


def test_every_kind_of_bad_sequence_in_fasta(tmp_path: Path) -> None:
    """White space within lines is a defect; line ends are not."""
    given = {name: sequence for name, sequence in MESS.items() if sequence is not None}
    (tmp_path / "f").write_bytes("".join(f">{n.replace(' ', '_')}\r\n{s}\r\n" for n, s in given.items()).encode())
    told = convert(Fasta([tmp_path / "f"]), str(tmp_path / "out"), Options(), max_reject_fraction=0.5)
    expected = {name.replace(" ", "_"): [sequence] for name, sequence in MESS_KEPT.items()}
    assert members_of(read_split(tmp_path / "out/train")) == expected
    assert rejected(told) == {"bad residue": 5, "empty sequence": 1, "cluster with no usable member": 6}
    assert changed(told) == {**MESS_CHANGED, "white space removed": 1}


def test_a_header_without_id_is_counted(tmp_path: Path) -> None:
    (tmp_path / "f").write_text(">a\nMK\n>\nMV\n")
    told = convert(Fasta([tmp_path / "f"]), str(tmp_path / "out"), Options(), max_reject_fraction=0.5)
    assert told["rejected"] == {"header without id": {"count": 1, "examples": ["record 2 of f"]}}
    assert (told["members_read"], told["members_written"]) == (2, 1)


def test_one_id_with_equal_and_with_different_sequences(tmp_path: Path) -> None:
    (tmp_path / "f").write_text(">a\nMK\n>a\nmk\n>b\nMK\n>b\nMV\n>c\nML\n")
    told = convert(Fasta([tmp_path / "f"]), str(tmp_path / "out"), Options(), max_reject_fraction=0.5)
    assert members_of(read_split(tmp_path / "out/train")) == {"a": [b"MK"], "c": [b"ML"]}
    assert told["rejected"]["different sequences under one id"] == {"count": 1, "examples": ["b"]}
    assert told["changed"]["sequence given again"] == {"count": 1, "examples": ["a"]}
    rows = [("c1", "a", "MK"), ("c1", "a", "MK"), ("c1", "b", "MK"), ("c1", "b", "MV"), ("c1", "c", "ML")]
    told = convert(flat(tmp_path / "x.parquet", rows), str(tmp_path / "flat"), Options(), max_reject_fraction=0.5)
    assert members_of(read_split(tmp_path / "flat/train")) == {"c1": [b"MK", b"ML"]}
    assert rejected(told) == {"different sequences under one id": 1}


def test_rows_of_one_cluster_are_joined(tmp_path: Path) -> None:
    columns = {"ur50_id": ["c", "d", "c"], "ur90_id": [["a", "b"], ["e"], ["b", "f"]]}
    layout = bionemo(tmp_path, columns, {"a": "MA", "b": "MD", "e": "ME", "f": "MF"})
    told = convert(layout, str(tmp_path / "out"), Options())
    assert members_of(read_split(tmp_path / "out/train")) == {"c": [b"MA", b"MD", b"MF"], "d": [b"ME"]}
    assert told["changed"] == {
        "cluster in several rows, joined": {"count": 1, "examples": ["c"]},
        "member named again in its cluster": {"count": 1, "examples": ["b"]},
    }
    assert told["rejected"] == {}


def test_a_member_of_two_clusters_stays_in_the_first(tmp_path: Path) -> None:
    names = [name for name, _ in in_order({name: [] for name in "abcdef"})]
    members = {name: [f"only {name}"] for name in names}
    members[names[1]] += ["shared", "twice", "twice"]
    members[names[4]] += ["shared"]
    members[names[5]] = ["shared"]
    proteins = {member: "MK" for ids in members.values() for member in ids}
    layout = bionemo(tmp_path, {"ur50_id": list(members), "ur90_id": list(members.values())}, proteins)
    told = convert(layout, str(tmp_path / "out"), Options(), max_reject_fraction=0.5)
    counts = {name: len(found) for name, found in members_of(read_split(tmp_path / "out/train")).items()}
    assert counts == {names[0]: 1, names[1]: 3, names[2]: 1, names[3]: 1, names[4]: 1}
    assert told["rejected"] == {
        "member of another cluster": {"count": 2, "examples": ["shared", "shared"]},
        "cluster with no usable member": {"count": 1, "examples": [names[5]]},
    }
    assert told["members_rejected"] == 2


def test_missing_ids_and_members_are_counted(tmp_path: Path) -> None:
    columns = {"ur50_id": ["c1", None, "c3", None], "ur90_id": [["a", None, "gone"], ["b"], [], []]}
    layout = bionemo(tmp_path, columns, {"a": "MK", "b": "MV"})
    told = convert(layout, str(tmp_path / "out"), Options(), max_reject_fraction=0.5)
    assert members_of(read_split(tmp_path / "out/train")) == {"c1": [b"MK"], "b": [b"MV"]}
    assert told["rejected"] == {
        "row without cluster id": {"count": 1, "examples": ["null"]},
        "member without id": {"count": 1, "examples": ["c1"]},
        "member without sequence": {"count": 1, "examples": ["gone"]},
        "cluster without members": {"count": 1, "examples": ["c3"]},
    }
    rows = [("c", "a", "MK"), (None, "b", "MV"), ("", "d", "ML"), ("c", None, "MI")]
    told = convert(flat(tmp_path / "x.parquet", rows), str(tmp_path / "flat"), Options(), max_reject_fraction=1)
    assert members_of(read_split(tmp_path / "flat/train")) == {"c": [b"MK"]}
    assert told["rejected"] == {
        "row without cluster id": {"count": 2, "examples": ["b", "d"]},
        "member without id": {"count": 1, "examples": ["c"]},
    }
    assert (told["members_read"], told["members_rejected"]) == (4, 3)
    layout = bionemo(tmp_path / "null", {"ur50_id": ["c1", "c2"], "ur90_id": [["a"], [None]]}, {"a": "MK"})
    told = convert(layout, str(tmp_path / "nulls"), Options(), max_reject_fraction=0.5)
    assert rejected(told) == {"member without id": 1, "cluster with no usable member": 1}


def test_a_cluster_of_the_other_split_is_rejected(tmp_path: Path) -> None:
    def layout(names: str) -> BioNeMo:
        return bionemo(tmp_path / names, {"ur50_id": list(names)}, dict.fromkeys(names, "MK"))

    convert(layout("abcd"), str(tmp_path / "out"), Options("train"))
    valid = layout("dxyz")
    told = convert(valid, str(tmp_path / "out"), Options("valid"), max_reject_fraction=0.25)
    assert set(members_of(read_split(tmp_path / "out/valid"))) == set("xyz")
    assert told["rejected"] == {"cluster of the other split": {"count": 1, "examples": ["d"]}}
    shutil.rmtree(tmp_path / "out/valid")
    with pytest.raises(
        UserError, match=r"^25\.0% of 4 members rejected.*cluster of the other split 1 \(such as 'd'\)"
    ):
        convert(valid, str(tmp_path / "out"), Options("valid"))


def test_the_other_split_is_that_of_this_folder_whatever_its_name(tmp_path: Path) -> None:
    """To DuckDB, the name of the second is a pattern for the first."""
    for out, train in (("data1", "dx"), ("data[1]", "ab")):
        for split, names in (("train", train), ("valid", "dxyz")):
            layout = bionemo(tmp_path / f"{out}-{split}", {"ur50_id": list(names)}, dict.fromkeys(names, "MK"))
            told = convert(layout, str(tmp_path / out), Options(split), max_reject_fraction=0.5)
    assert told["clusters_written"] == 4


IDS_DAMAGED: dict[str, Callable[[Path], object]] = {
    "flipped": lambda path: flip(path, path.stat().st_size // 2),
    "none": lambda path: write_clusters(path, {"cluster_id": pa.array([], pa.string())}),
    "null": lambda path: write_clusters(path, {"cluster_id": pa.array([None] * 4, pa.string())}),
    "one": lambda path: write_clusters(path, {"cluster_id": ["a"] * 4}),
    "others": lambda path: write_clusters(path, {"cluster_id": list("efgh")}),
}


@pytest.mark.parametrize(
    ("damage", "hashed"),
    [*((damage, True) for damage in IDS_DAMAGED), *((damage, False) for damage in ("none", "null", "one"))],
)
def test_damaged_ids_of_the_other_split_bring_none_of_its_clusters_in(
    tmp_path: Path, damage: str, hashed: bool
) -> None:
    train, valid = (
        bionemo(tmp_path / names, {"ur50_id": list(names)}, dict.fromkeys(names, "MK"))
        for names in ("dxyz", "abcd")
    )
    told = convert(valid, str(tmp_path / "out"), Options("valid"))
    if not hashed:  # as it was before there was one; then the ids are counted
        told.pop("cluster_ids_xxh64", None)
        (tmp_path / "out/valid/conversion.json").write_text(json.dumps(told))
    same = partial(convert, train, str(tmp_path / "out"), Options(), max_reject_fraction=0.25)
    ids = tmp_path / "out/valid/cluster_ids.parquet"
    whole = ids.read_bytes()
    IDS_DAMAGED[damage](ids)
    with pytest.raises(UserError, match=r"valid/cluster_ids\.parquet.* damaged"):
        same()
    ids.write_bytes(whole)
    assert rejected(same()) == {"cluster of the other split": 1}


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{")], ids=["missing", "damaged"])
def test_another_split_that_does_not_tell_its_clusters_is_named(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    convert(small(tmp_path), str(tmp_path / "out"), Options("valid"))
    damage(tmp_path / "out/valid/conversion.json")
    with pytest.raises(UserError, match=r"valid(/| has no )conversion\.json.*choose another --out"):
        convert(small(tmp_path / "train"), str(tmp_path / "out"), Options())


def test_splits_converted_at_the_same_time_share_no_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, valid = (
        bionemo(tmp_path / names, {"ur50_id": list(names)}, dict.fromkeys(names, "MK"))
        for names in ("abcd", "dxyz")
    )
    out = str(tmp_path / "out")
    build = parts.PartBuilder.build

    def meanwhile(self: parts.PartBuilder, *arguments: Any) -> parts.Part:
        monkeypatch.setattr(parts.PartBuilder, "build", build)
        convert(valid, out, Options("valid"))
        return build(self, *arguments)

    monkeypatch.setattr(parts.PartBuilder, "build", meanwhile)
    with pytest.raises(
        UserError, match=r"the other split has changed since train was compared.*the same command again"
    ):
        convert(train, out, Options("train"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["valid"]
    told = convert(train, out, Options("train"), max_reject_fraction=0.25)
    assert rejected(told) == {"cluster of the other split": 1}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"ur50_id": pa.array([], pa.string())}, "no cluster to write: the input is empty"),
        (
            {"ur50_id": ["c"], "ur90_id": pa.array([[]], pa.list_(pa.string()))},
            "no cluster to write: cluster without",
        ),
    ],
)
def test_nothing_to_write_leaves_nothing(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        convert(bionemo(tmp_path, columns, {}), str(tmp_path / "out"), Options(), max_reject_fraction=1)
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_of_the_user_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="no cluster to write"):
        convert(bionemo(tmp_path, {"ur50_id": pa.array([], pa.string())}, {}), str(tmp_path / "out"), Options())
    assert not list((tmp_path / "out").iterdir())


def test_too_many_rejected_stops_before_the_end(tmp_path: Path, small_parts: None) -> None:
    names = [f"c{number}" for number in range(1000)]
    layout = bionemo(tmp_path, {"ur50_id": names}, {})
    seen = []
    with pytest.raises(UserError, match=r"% of 1,000 members rejected, more than 1\.0%: member without sequence"):
        convert(layout, str(tmp_path / "out"), Options(), progress=lambda *args: seen.append(args))
    assert max(done for _, done, _ in seen) < 200


@pytest.mark.parametrize("named", [True, False])
def test_too_many_clusters_without_members_stop_it(tmp_path: Path, named: bool) -> None:
    columns = {"ur90_id": [["a"], ["b"], [], None], **({"ur50_id": list("abcd")} if named else {})}
    layout = bionemo(tmp_path, columns, {"a": "MK", "b": "MV"})
    with pytest.raises(UserError, match=r"^50\.0% of 4 clusters name no member, more than 49\.0%"):
        convert(layout, str(tmp_path / "out"), Options(), max_reject_fraction=0.49)
    assert not (tmp_path / "out").exists()
    assert convert(layout, str(tmp_path / "out"), Options(), max_reject_fraction=0.5)["clusters_written"] == 2


# --- huge clusters ---


def huge(folder: Path, members: int, length: int) -> BioNeMo:
    ids = [f"m{number:06}" for number in range(members)]
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
    proteins = {name: rng.choice(letters, length).tobytes().decode() for name in ids}
    return bionemo(
        folder, {"ur50_id": ["huge", "small"], "ur90_id": [ids, ["m000001x"]]}, {**proteins, "m000001x": "MK"}
    )


def test_huge_clusters_are_whole_unless_capped(tmp_path: Path) -> None:
    layout = huge(tmp_path, 20_000, 50)
    told = convert(layout, str(tmp_path / "whole"), Options())
    assert {name: len(ids) for name, ids in members_of(read_split(tmp_path / "whole/train")).items()} == {
        "huge": 20_000,
        "small": 1,
    }
    assert told["members_written"] == 20_001
    told = convert(layout, str(tmp_path / "capped"), Options(max_members_per_cluster=100, seed=3))
    assert told["members_left_out"] == 19_900
    assert told["state"]["options"] == {"split": "train", "max_members_per_cluster": 100, "seed": 3}
    whole, capped = (members_of(read_split(tmp_path / out / "train"))["huge"] for out in ("whole", "capped"))
    assert len(capped) == 100
    kept = set(capped)
    assert [member for member in whole if member in kept] == capped


def test_sequences_of_a_huge_cluster_are_looked_up_a_few_at_a_time_and_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Found(dict):
        """A dict that can be watched."""

    look_up, given, held = Sequences.look_up, [], []

    def watched(self: Sequences, ids: list[str]) -> Found:
        held.append(sum(found() is not None for found in given))
        found = Found(look_up(self, ids))
        given.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Sequences, "look_up", watched)
    layout = huge(tmp_path, 3 * parts.MEMBERS_AT_ONCE, 10)
    told = convert(layout, str(tmp_path / "out"), Options())
    assert told["members_written"] == told["sequences_found"] == 3 * parts.MEMBERS_AT_ONCE + 1
    assert len(held) == 4  # three for the huge cluster, one for the small
    assert max(held) == 1  # the one before goes when the next has come


def test_a_cluster_too_large_for_a_sample_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MAX_CLUSTER_BYTES", 2**20)
    layout = huge(tmp_path, 12_000, 100)
    with pytest.raises(
        UserError, match=r"cluster huge has more than 1 MiB of residues.*--max-members-per-cluster"
    ):
        convert(layout, str(tmp_path / "out"), Options())
    convert(layout, str(tmp_path / "out"), Options(max_members_per_cluster=100))


# --- what is there already ---


def small(folder: Path, sequence: str = "MK") -> BioNeMo:
    return bionemo(folder, {"ur50_id": ["a", "b"]}, {"a": "MKV", "b": sequence})


def test_a_finished_split_is_left_alone(tmp_path: Path) -> None:
    layout = small(tmp_path)
    first = convert(layout, str(tmp_path / "out"), Options())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = convert(layout, str(tmp_path / "out"), Options())
    assert again == {**first, "already_done": True}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    with pytest.raises(UserError, match=r"exists already.*options\.seed was 0, is 1"):
        convert(layout, str(tmp_path / "out"), Options(seed=1))
    with pytest.raises(UserError, match=r"inputs\.clusters\.0\.path was .*, is "):
        convert(small(tmp_path / "other"), str(tmp_path / "out"), Options())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize("name", ["clusters_written", "members_written", "residues_written", "state"])
def test_a_finished_split_whose_counts_are_lost_is_refused(tmp_path: Path, name: str) -> None:
    layout = small(tmp_path)
    told = convert(layout, str(tmp_path / "out"), Options())
    for lost in ({**told, name: "many"}, {key: told[key] for key in told if key != name}):
        (tmp_path / "out/train/conversion.json").write_text(json.dumps(lost))
        with pytest.raises(UserError, match=r"train/conversion\.json is damaged, or of another version"):
            convert(layout, str(tmp_path / "out"), Options())


@pytest.mark.parametrize("files", [["mine.txt"], ["index.json"], ["index.json", "conversion.json"]])
def test_a_folder_that_is_no_conversion_is_refused_and_left_alone(tmp_path: Path, files: list[str]) -> None:
    out = tmp_path / "out" / "train"
    out.mkdir(parents=True)
    for name in files:
        (out / name).write_text('{"mine": 1}')
    with pytest.raises(UserError, match="remove it, or choose another --out"):
        convert(small(tmp_path), str(tmp_path / "out"), Options())
    assert sorted(tmp_path.glob("out/**/*")) == sorted([out, *(out / name for name in files)])


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        convert(small(tmp_path), str(tmp_path / "file"), Options())


# --- interruptions ---

CONVERT = """
import sys
import time
import weakref
from pathlib import Path
from esm2_composer import conversion, conversion_plan, parts
from esm2_composer.layouts import BioNeMo
conversion_plan.PART_CLUSTERS = 16
build = parts.PartBuilder.build
def slow(self, number, look_up):
    print(number, flush=True)
    time.sleep(0.02)
    return build(self, number, look_up)
parts.PartBuilder.build = slow
folder = Path(sys.argv[1])
layout = BioNeMo(folder / "clusters.parquet", folder / "proteins.db")
conversion.convert(layout, sys.argv[2], conversion.Options(), workers=1)
"""


def start(folder: Path, out: Path, **options: Any) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CONVERT, folder, out],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture
def many(tmp_path: Path) -> BioNeMo:
    named, proteins = random_data(800)
    return bionemo(tmp_path, {"ur50_id": list(named), "ur90_id": list(named.values())}, proteins)


def test_a_killed_run_goes_on_and_ends_alike(tmp_path: Path, many: BioNeMo) -> None:
    """Killed again and again, until a run gets through."""
    whole = start(tmp_path, tmp_path / "whole")
    parts = len(whole.communicate()[0].split())
    assert whole.returncode == 0
    assert parts == 50
    built: list[list[int]] = []
    for stop_after in (1, 12, None):
        process = start(tmp_path, tmp_path / "killed")
        built.append([])
        for line in process.stdout:
            built[-1].append(int(line))
            if len(built[-1]) == stop_after:
                process.kill()
        process.wait()
        process.stdout.close()
        if stop_after is not None:
            assert not (tmp_path / "killed/train").exists()
    assert process.returncode == 0
    assert set().union(*built) == set(range(parts))
    assert built[-1][0] >= 10  # what the killed runs finished was not done again
    assert hashes(tmp_path / "killed/train") == hashes(tmp_path / "whole/train")
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["train"]


@pytest.mark.slow
def test_workers_die_with_a_killed_parent(tmp_path: Path) -> None:
    names = [f"c{index}" for index in range(conversion_plan.PART_CLUSTERS * 3)]
    layout = bionemo(tmp_path, {"ur50_id": names}, dict.fromkeys(names, "MKV" * 50))
    command = [sys.executable, ROOT / "tools/convert.py", "--workers", "2", "--out", tmp_path / "out"]
    command += ["--clusters", tmp_path / "clusters.parquet", "--sequences", tmp_path / "proteins.db"]
    process = psutil.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    workers: list[psutil.Process] = []
    while len(workers) < 2 and process.poll() is None:
        time.sleep(0.01)
        workers = [child for child in process.children() if "--multiprocessing-fork" in child.cmdline()]
    process.kill()
    process.wait()
    assert len(workers) == 2
    _, still_there = psutil.wait_procs(workers, timeout=60)
    assert not still_there
    assert convert(layout, str(tmp_path / "out"), Options())["clusters_written"] == len(names)


def test_a_second_run_into_one_folder_is_refused_until_the_first_is_dead(tmp_path: Path, many: BioNeMo) -> None:
    first = start(tmp_path, tmp_path / "out")
    first.stdout.readline()
    first.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match="another conversion is at work there"):
        convert(many, str(tmp_path / "out"), Options())
    first.kill()
    first.wait()
    first.stdout.close()
    assert convert(many, str(tmp_path / "out"), Options())["clusters_written"] == 800


@pytest.mark.parametrize("third", [False, True])
def test_a_lock_that_the_first_run_removed_at_its_end_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, third: bool
) -> None:
    """Opened before that, locked after it: a third run may hold the file that has its name now."""
    flock = fcntl.flock

    def flock_late(file: TextIO, operation: int) -> None:
        Path(file.name).unlink()
        if third:
            Path(file.name).touch()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    with pytest.raises(UserError, match="another conversion is at work there"):
        convert(small(tmp_path), str(tmp_path / "out"), Options())


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"out/\.train\.work: cannot be made and locked \(No locks available\)"):
        convert(small(tmp_path), str(tmp_path / "out"), Options())
    assert not list((tmp_path / "out").iterdir())


def test_no_file_is_open_in_work_that_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS cannot remove it then."""
    removed = []
    rmtree = shutil.rmtree

    def watched(folder: Path) -> None:
        opened = map(os.path.realpath, Path("/proc/self/fd").iterdir())
        assert not [path for path in opened if path.startswith(f"{folder}/")]
        removed.append(folder.name)
        rmtree(folder)

    monkeypatch.setattr(shutil, "rmtree", watched)
    (tmp_path / "f").write_text(">a\nMK\n>b\nM-K\n")
    with pytest.raises(UserError, match="rejected"):
        convert(Fasta([tmp_path / "f"]), str(tmp_path / "out"), Options())
    for _ in range(2):
        convert(Fasta([tmp_path / "f"]), str(tmp_path / "out"), Options(), max_reject_fraction=0.5)
    assert removed == [".train.work"] * 3
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]


@pytest.mark.parametrize("stops", [True, False])
def test_a_worker_that_writes_on_hides_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    """Spark's are told to stop, and not waited for."""
    faults = [errno.ENOTEMPTY, errno.EBUSY]  # the second on NFS
    rmtree = shutil.rmtree

    def disturbed(folder: Path) -> None:
        if stops and not faults:
            return rmtree(folder)
        raise OSError(faults.pop() if stops else errno.ENOTEMPTY, "disturbed")

    monkeypatch.setattr(shutil, "rmtree", disturbed)
    monkeypatch.setattr(conversion, "SECONDS_TO_STOP", 10 if stops else 0.1)
    (tmp_path / "f").write_text(">a\nM-K\n")
    with pytest.raises(UserError, match=r"members rejected.*") as caught:
        convert(Fasta([tmp_path / "f"]), str(tmp_path / "out"), Options())
    assert ("out/.train.work cannot be removed" in str(caught.value)) == (not stops)
    assert (tmp_path / "out").exists() == (not stops)


def test_unfinished_work_of_another_input_is_refused(tmp_path: Path, many: BioNeMo) -> None:
    process = start(tmp_path, tmp_path / "out")
    process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    held = sorted((tmp_path / "out").rglob("*"))
    with pytest.raises(UserError, match=r"holds unfinished work.*options\.max_members_per_cluster was None, is 2"):
        convert(many, str(tmp_path / "out"), Options(max_members_per_cluster=2))
    write_proteins(tmp_path / "more.db", {"x": "MK"}).replace(tmp_path / "proteins.db")
    with pytest.raises(UserError, match=r"inputs\.sequences\.0\.bytes was \d+, is \d+"):
        convert(many, str(tmp_path / "out"), Options())
    assert sorted((tmp_path / "out").rglob("*")) == held


def test_what_sqlite_has_not_put_into_its_file_is_a_change_of_the_input(tmp_path: Path) -> None:
    clusters, proteins = write_layout(tmp_path, {"ur50_id": ["a"]}, {"a": "MK"})
    with contextlib.closing(sqlite3.connect(proteins)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        same = partial(convert, BioNeMo(clusters, proteins), str(tmp_path / "out"), Options())
        same()
        assert same()["already_done"]  # the log is empty, or is not there
        with database:
            database.execute("UPDATE protein SET sequence = 'MV'")
        with pytest.raises(UserError, match=r"inputs\.sequences\.1\.bytes was None, is \d+"):
            same()
        shutil.rmtree(tmp_path / "out")
        same()
        assert same()["already_done"]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


@pytest.fixture
def cut_off(tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Any]]:
    """A conversion to tmp_path / "out" that was stopped just before its final rename; goes on with it."""
    _, proteins = random_data(16)
    (tmp_path / "f").write_text("".join(f">{name}\n{sequence}\n" for name, sequence in proteins.items()))
    same = partial(convert, Fasta([tmp_path / "f"]), str(tmp_path / "out"), Options())

    def stop(_: LocalSplit) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LocalSplit, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            same()
    return same


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": lambda path: flip(path, path.stat().st_size // 2),
    "gone": Path.unlink,
    "other": lambda path: path.write_text("{}"),
}
WORK = ["shards/shard.00000.00.mds.zstd", "parts/00000.json", "parts/00000.ids", "plan.json", "plan.parquet"]
WORK += ["staged.json", "ids.parquet", "sequences.db"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in WORK for damage in DAMAGE if (name, damage) != ("sequences.db", "flipped")],
)
def test_work_that_is_damaged_is_done_again(
    tmp_path: Path, cut_off: Callable[[], dict[str, Any]], name: str, damage: str
) -> None:
    work, split = tmp_path / "out/.train.work", tmp_path / "out/train"
    expected = hashes(work / "shards")
    DAMAGE[damage](work / name)
    if "/" not in name:  # what follows from it is not there yet
        (work / "parts/00001.json").unlink()
        if not name.startswith("plan"):
            (work / "plan.json").unlink()
    told = cut_off()
    assert told["clusters_written"] == told["members_read"] == told["sequences_read"]
    assert hashes(split) == expected
    assert {path.name for path in split.iterdir()} == {*expected, "conversion.json"}


def test_only_the_damaged_part_is_made_again(
    tmp_path: Path, cut_off: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    built, build = [], parts.PartBuilder.build
    monkeypatch.setattr(
        parts.PartBuilder, "build", lambda self, number, *rest: built.append(number) or build(self, number, *rest)
    )
    flip(tmp_path / "out/.train.work/shards/shard.00001.00.mds.zstd", 100)
    cut_off()
    assert built == [1]


def test_a_part_that_is_damaged_before_the_parts_are_joined_keeps_the_work(
    tmp_path: Path, cut_off: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, join = tmp_path / "out/.train.work/parts/00001.ids", conversion._join
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_join", lambda *given: flip(path, 50) or join(*given))
        with pytest.raises(Interrupted, match=r"parts/00001\.json or its \.ids"):
            cut_off()
    cut_off()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"7"])
def test_a_damaged_state_is_told(tmp_path: Path, cut_off: Callable[[], dict[str, Any]], content: bytes) -> None:
    (tmp_path / "out/.train.work/state.json").write_bytes(content)
    with pytest.raises(UserError, match=r"state\.json: damaged; remove|holds unfinished work, of another"):
        cut_off()


def test_work_of_nobody_knows_what_is_begun_anew(tmp_path: Path, cut_off: Callable[[], dict[str, Any]]) -> None:
    (tmp_path / "out/.train.work/state.json").unlink()
    (tmp_path / "g").write_text(">a\nMK\n")
    convert(Fasta([tmp_path / "g"]), str(tmp_path / "out"), Options())
    assert members_of(read_split(tmp_path / "out/train")) == {"a": [b"MK"]}


@pytest.fixture
def full_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when the first part is to be built, and no more at the next attempt."""
    build, attempts = parts.PartBuilder.build, []

    def fail(self: parts.PartBuilder, *arguments: Any) -> parts.Part:
        attempts.append(arguments)
        if len(attempts) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return build(self, *arguments)

    monkeypatch.setattr(parts.PartBuilder, "build", fail)


def test_a_run_that_goes_on_from_another_folder_reads_the_same_sequences(
    tmp_path: Path, full_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = "clusters.parquet", "proteins.db"
    for folder, sequence in (("a", "MK"), ("b", "WW")):
        bionemo(tmp_path / folder, {"ur50_id": ["c"]}, {"c": sequence})
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(Interrupted):
        convert(BioNeMo(*map(Path, paths)), str(tmp_path / "out"), Options())
    monkeypatch.chdir(tmp_path / "b")
    convert(BioNeMo(*(tmp_path / "a" / name for name in paths)), str(tmp_path / "out"), Options())
    assert members_of(read_split(tmp_path / "out/train")) == {"c": [b"MK"]}


def test_a_full_disk_keeps_the_work(tmp_path: Path, many: BioNeMo) -> None:
    """The limit of a file's size stands in for the disk's: a write fails in the middle."""
    convert(many, str(tmp_path / "whole"), Options())
    limit = (tmp_path / "whole/train/shard.00000.00.mds.zstd").stat().st_size - 100
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(Interrupted, match="the work is kept: run the same command again to go on"):
            convert(many, str(tmp_path / "out"), Options())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out/train").exists()
    (tmp_path / "out/.train.work/shards/.shard.00000.00.mds.zstd.aside").touch()  # as a SIGKILL leaves it
    convert(many, str(tmp_path / "out"), Options())
    assert not list((tmp_path / "out/train").glob(".*"))
    assert hashes(tmp_path / "out/train") == hashes(tmp_path / "whole/train")


def test_what_a_marker_vouches_for_is_on_the_disk_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = [], os.fsync

    def watched(file: int) -> None:
        synced.append(Path(f"/proc/self/fd/{file}").readlink().name)
        fsync(file)

    monkeypatch.setattr(os, "fsync", watched)
    (tmp_path / "f").write_text(">a\nMK\n")
    convert(Fasta([tmp_path / "f"]), str(tmp_path / "out"), Options())
    names = [re.sub(r"^\.(.+)\.\w+$", r"\1", name) for name in synced]
    expected = ["state.json", "sequences.db", "ids.parquet", "staged.json", "plan.parquet", "plan.json"]
    expected += ["shard.00000.00.mds.zstd", "00000.ids", "00000.json"]
    assert names == [*expected, "cluster_ids.parquet", "conversion.json", "index.json"]


def test_a_plan_that_is_damaged_meanwhile_is_told_and_made_anew(
    tmp_path: Path, many: BioNeMo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*given: Any) -> conversion_plan.Plan:
        plan = make_plan(*given)
        plan.path.write_bytes(bytes(5000))
        return plan

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "make_plan", damaged)
        with pytest.raises(UserError, match=r"plan\.parquet \(the same command makes it anew\): damaged"):
            convert(many, str(tmp_path / "out"), Options())
    assert convert(many, str(tmp_path / "out"), Options())["clusters_written"] == 800


def test_a_file_that_cannot_be_read_for_now_keeps_the_work(tmp_path: Path) -> None:
    layout = small(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "proteins.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(
            Interrupted, match=r"proteins\.db: cannot be read \(database is locked\); the work is kept"
        ):
            convert(layout, str(tmp_path / "out"), Options())
    assert (tmp_path / "out/.train.work/plan.json").exists()
    convert(layout, str(tmp_path / "out"), Options())
    (tmp_path / "f").symlink_to("/proc/self/mem")  # whose first byte is an I/O error
    with pytest.raises(Interrupted, match=r"f: cannot be read \(Input/output error\); the work is kept"):
        convert(Fasta([tmp_path / "f"]), str(tmp_path / "fasta"), Options())
    assert (tmp_path / "fasta/.train.work/state.json").exists()


@pytest.mark.parametrize("fault", ["file size", "memory"])
def test_a_plan_that_cannot_be_made_for_now_keeps_the_work(
    tmp_path: Path, many: BioNeMo, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        if fault == "memory":
            patch.setattr(conversion_plan, "MEMORY_A_THREAD", 2**20)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
        try:
            with pytest.raises(Interrupted, match="the work is kept"):
                convert(many, str(tmp_path / "out"), Options())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "out/.train.work/staged.json").exists()
    assert not (tmp_path / "out/.train.work/plan.json").exists()
    assert convert(many, str(tmp_path / "out"), Options())["clusters_written"] == 800


# --- real data ---


def real_layout(name: str, split: str) -> BioNeMo:
    paths = [REAL_DATA / name / file for file in SPLIT_FILES[split]]
    if not all(path.exists() for path in paths):
        pytest.skip(f"no real data in {REAL_DATA / name}; ESM2_REAL_DATA names the folder of tiny/ and full/")
    return BioNeMo(*paths)


def assert_counts(told: dict[str, Any], name: str, split: str) -> None:
    clusters, members, residues, lengths = REAL_COUNTS[name, split]
    assert (told["clusters_read"], told["clusters_written"]) == (clusters, clusters)
    assert (told["members_read"], told["members_written"]) == (members, members)
    assert told["residues_written"] == residues
    assert told["member_lengths"] == dict(zip(LENGTH_LABELS, lengths, strict=True))
    assert told["rejected"] == told["changed"] == {}


@pytest.mark.parametrize(("name", "split"), REAL_COUNTS)
def test_real_data_is_converted_whole(tmp_path: Path, name: str, split: str) -> None:
    told = convert(real_layout(name, split), str(tmp_path), Options(split), max_reject_fraction=0, workers=2)
    assert_counts(told, name, split)


def test_real_proteins_give_the_same_shards_through_every_layout(tmp_path: Path) -> None:
    """`tiny` as BioNeMo's files, as flat parquet, and as FASTA with MMseqs2's TSV.

    The TSV names clusters by their representative, so BioNeMo's table goes without its `ur50_id` there.
    """
    layout = real_layout("tiny", "train")
    clusters = pq.read_table(layout.inputs["clusters"][0])
    folder = REAL_DATA / "tiny" / "fasta"
    valid = {line.replace("UniRef50_", "UniRef90_") for line in (folder / "valid_ids.txt").read_text().split()}
    lines = [
        line for line in (folder / "cluster.tsv").read_text().splitlines() if line.split("\t")[0] not in valid
    ]
    (tmp_path / "train.tsv").write_text("\n".join(lines))
    write_clusters(tmp_path / "unnamed.parquet", {"ur90_id": clusters["ur90_id"]})
    fasta = Fasta([folder / "members.fasta"], tmp_path / "train.tsv")
    unnamed = BioNeMo(tmp_path / "unnamed.parquet", layout.inputs["sequences"][0])
    told = {
        name: convert(one, str(tmp_path / name), Options())
        for name, one in {"tsv": fasta, "bare": unnamed}.items()
    }
    assert hashes(tmp_path / "tsv/train") == hashes(tmp_path / "bare/train")

    convert(layout, str(tmp_path / "named"), Options())
    named = members_of(read_split(tmp_path / "named/train"))
    rows = []
    for row in clusters.to_pylist():
        pairs = zip(sorted(row["ur90_id"]), named[row["ur50_id"]], strict=True)
        rows += [(row["ur50_id"], member, sequence.decode()) for member, sequence in pairs]
    random.Random(0).shuffle(rows)
    told["flat"] = convert(flat(tmp_path / "flat.parquet", rows), str(tmp_path / "flat"), Options())
    assert hashes(tmp_path / "flat/train") == hashes(tmp_path / "named/train")
    for conversion_json in told.values():
        assert_counts(conversion_json, "tiny", "train")

    (tmp_path / "valid.tsv").write_text("".join(f"{name}\t{name}\n" for name in valid))
    told = convert(
        Fasta([folder / "members.fasta"], tmp_path / "valid.tsv"), str(tmp_path / "tsv"), Options("valid")
    )
    assert_counts(told, "tiny", "valid")
    told = convert(Fasta([folder / "uniref50.fasta.gz"]), str(tmp_path / "alone"), Options())
    assert (told["clusters_written"], told["members_written"]) == (352, 352)
    assert told["residues_written"] == 105_547
