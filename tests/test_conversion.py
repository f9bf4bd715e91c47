"""conversion/convert.py: every layout gives the same shards, with any number of workers."""

from __future__ import annotations

import gzip
import json
import random
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REAL_DATA
from raw_data import (
    MESS,
    SPLIT_FILES,
    bionemo,
    flat,
    hashes,
    in_order,
    members_of,
    random_data,
    read_split,
    write_clusters,
)
from test_records import assert_same_records

from esm2_composer.conversion import parts
from esm2_composer.conversion import plan as conversion_plan
from esm2_composer.conversion.convert import Options, convert
from esm2_composer.conversion.layouts import BioNeMo, Fasta, Flat, Layout
from esm2_composer.conversion.plan import make_plan
from esm2_composer.conversion.proteins import Sequences
from esm2_composer.conversion.records import LENGTH_LABELS, Report
from esm2_composer.errors import UserError

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


def rejected(told: dict[str, Any]) -> dict[str, int]:
    return {reason: entry["count"] for reason, entry in told["rejected"].items()}


def changed(told: dict[str, Any]) -> dict[str, int]:
    return {reason: entry["count"] for reason, entry in told["changed"].items()}


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
