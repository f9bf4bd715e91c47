"""conversion/convert.py: two splits beside each other share no cluster, whichever is made first, or meanwhile."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from raw_data import bionemo, flip, members_of, read_split, two_clusters, write_clusters
from test_conversion import rejected

from esm2_composer.conversion import parts
from esm2_composer.conversion.convert import Options, convert
from esm2_composer.conversion.layouts import BioNeMo
from esm2_composer.errors import UserError


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


@pytest.mark.parametrize("damage", IDS_DAMAGED)
def test_damaged_ids_of_the_other_split_bring_none_of_its_clusters_in(tmp_path: Path, damage: str) -> None:
    train, valid = (
        bionemo(tmp_path / names, {"ur50_id": list(names)}, dict.fromkeys(names, "MK"))
        for names in ("dxyz", "abcd")
    )
    convert(valid, str(tmp_path / "out"), Options("valid"))
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
    convert(two_clusters(tmp_path), str(tmp_path / "out"), Options("valid"))
    damage(tmp_path / "out/valid/conversion.json")
    with pytest.raises(UserError, match=r"valid(/| has no )conversion\.json.*choose another --out"):
        convert(two_clusters(tmp_path / "train"), str(tmp_path / "out"), Options())


def test_a_split_waits_for_the_other_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, layout, build = str(tmp_path / "out"), two_clusters(tmp_path), parts.PartBuilder.build

    def meanwhile(self: parts.PartBuilder, *arguments: Any) -> parts.Part:
        with pytest.raises(UserError, match=r"out/\.train\.work: train is being converted there"):
            convert(layout, out, Options("valid"))
        assert not (tmp_path / "out/.valid.work").exists()
        return build(self, *arguments)

    monkeypatch.setattr(parts.PartBuilder, "build", meanwhile)
    convert(layout, out, Options("train"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]


def test_a_finished_split_is_left_while_the_other_is_converted(tmp_path: Path) -> None:
    out, layout = str(tmp_path / "out"), two_clusters(tmp_path)
    convert(layout, out, Options("train"))
    with (tmp_path / "out/.valid.work.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "already_done" in convert(layout, out, Options("train"))


@pytest.mark.parametrize("left", [Path.touch, lambda path: path.touch(0o000)], ids=["mine", "another user's"])
def test_a_lock_that_a_killed_conversion_left_holds_nobody(tmp_path: Path, left: Callable[[Path], object]) -> None:
    (tmp_path / "out").mkdir()
    left(tmp_path / "out/.valid.work.lock")
    assert convert(two_clusters(tmp_path), str(tmp_path / "out"), Options())["clusters_written"] == 2


def test_splits_converted_at_the_same_time_share_no_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where locks do not tell, as of two machines that write to a store."""
    monkeypatch.setattr("esm2_composer.conversion.convert.refuse_while_other_is_converted", lambda *_: None)
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
