"""splits.py: where shards lie, and of which split they are."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from esm2_composer.data.splits import cannot_be_unpacked, check_data, count_clusters, lacking
from esm2_composer.errors import UserError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "index.json").write_text('{"shards": [{"samples": 3}, {"samples": 4}]}')
        written = {"state": {"options": {"split": split}}}
        (tmp_path / split / "conversion.json").write_text(json.dumps(written))
    return tmp_path


def test_a_split_in_the_others_place_is_seen(data: Path) -> None:
    assert lacking(str(data), "train") is lacking(str(data), "valid") is None
    (data / "valid/conversion.json").write_text((data / "train/conversion.json").read_text())
    assert lacking(str(data), "valid").startswith(f"{data}/valid: train shards, by conversion.json")


@pytest.mark.parametrize("content", ["", "[]", '{"state": 3}', '{"state": {"options": {"split": "test"}}}', None])
def test_shards_of_others_do_not_tell_their_split(data: Path, content: str | None) -> None:
    (data / "train/conversion.json").unlink()
    if content is not None:
        (data / "train/conversion.json").write_text(content)
    assert lacking(str(data), "train") is None


@pytest.mark.parametrize("packed", ["zstd", "gz"])
def test_what_is_packed_where_nobody_writes_cannot_be_unpacked(
    data: Path, monkeypatch: pytest.MonkeyPatch, packed: str
) -> None:
    (data / "train" / f"a.mds.{packed}").touch()
    assert not cannot_be_unpacked(data / "train")
    monkeypatch.setattr(os, "access", lambda *_: False)  # permissions do not bind who runs tests as root
    assert cannot_be_unpacked(data / "train")
    with pytest.raises(UserError, match=rf"--data {data}: shards cannot be unpacked there; add --local"):
        check_data(str(data), None, ["train"])
    check_data(str(data), str(data / "cache"), ["train"])
    check_data(str(data), None, ["valid"])
    (data / "train/a.mds").touch()
    assert not cannot_be_unpacked(data / "train")


@pytest.mark.parametrize(
    ("place", "local", "told"),
    [
        ("s3://", None, "--data s3://: write a folder or s3://bucket/prefix"),
        ("s3:///x", "cache", "--data s3:///x: write a folder"),
        ("s3:/bucket/x", "cache", "--data s3:/bucket/x: write a folder"),
        ("s3://bucket/x", None, "--data s3://bucket/x needs --local"),
        ("nowhere", None, "nowhere: no such folder in "),
        ("s3://bucket/x", "s3://bucket/cache", "--local is s3://bucket/cache; it must be a folder"),
    ],
)
def test_data_that_cannot_be_read_are_one_line(place: str, local: str | None, told: str) -> None:
    with pytest.raises(UserError, match=f"^{told}"):
        check_data(place, local, ["valid"])


def test_clusters_are_counted_by_the_index(data: Path) -> None:
    assert count_clusters((data / "train/index.json").read_bytes()) == 7
    for other in (b"{}", b"[]", b"x", b"\xff", b"[" * 100_000):
        assert count_clusters(other) == 0
