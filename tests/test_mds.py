"""mds.py: its shards are Streaming's, byte for byte, and read as Streaming reads them."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zstd
from streaming import MDSWriter

from esm2_composer.data import mds
from esm2_composer.data.mds import COLUMNS, Shard, ShardWriter, check_index, encode_sample
from esm2_composer.errors import UserError


def sample(members: int, name: str = "UniRef50_Grün") -> dict[str, Any]:
    lengths = np.random.default_rng(members).integers(1, 4, members).astype(np.int32)
    residues = (b"MKV" * int(lengths.sum()))[: lengths.sum()]
    return {"cluster_id": name, "lengths": lengths, "residues": residues}


SAMPLES = [sample(members) for members in (1, 2, 255, 256, 300, 65_535, 65_536, 70_000)] + [sample(1, "")]


@pytest.mark.parametrize("limit", [2**26, 150_000, 1000])
def test_shards_equal_those_of_streaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(mds, "SHARD_BYTES", limit)
    monkeypatch.setitem(mds._CONFIG, "size_limit", limit)
    monkeypatch.setattr(mds, "_CONFIG_BYTES", json.dumps(mds._CONFIG, sort_keys=True).encode())
    with MDSWriter(
        out=str(tmp_path / "theirs"), columns=COLUMNS, compression="zstd:1", hashes=["xxh64"], size_limit=limit
    ) as writer:
        for one in SAMPLES:
            writer.write(one)
    (tmp_path / "ours").mkdir()
    ours = ShardWriter(tmp_path / "ours", "00007")
    for one in SAMPLES:
        ours.write(one)
    entries = ours.finish()
    expected = json.loads((tmp_path / "theirs" / "index.json").read_text())["shards"]
    # Streaming writes an empty shard where the first sample alone is above the limit.
    expected = [entry for entry in expected if entry["samples"]]
    for number, (mine, theirs) in enumerate(zip(entries, expected, strict=True)):
        assert mine["zip_data"]["basename"] == f"shard.00007.{number:02}.mds.zstd"
        content = (tmp_path / "ours" / mine["zip_data"]["basename"]).read_bytes()
        assert content == (tmp_path / "theirs" / theirs["zip_data"]["basename"]).read_bytes()
        for data in ("raw_data", "zip_data"):
            del mine[data]["basename"], theirs[data]["basename"]
        assert mine == theirs


def test_mapped_samples_are_those_written(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "0")
    for one in SAMPLES:
        writer.write(one)
    (entry,) = writer.finish()
    (tmp_path / "raw").write_bytes(zstd.decompress((tmp_path / entry["zip_data"]["basename"]).read_bytes()))
    shard = Shard.mapped(tmp_path / "raw")
    for number in reversed(range(len(SAMPLES))):
        read, written = shard[number], SAMPLES[number]
        assert read["cluster_id"] == written["cluster_id"]
        assert np.array_equal(read["lengths"], written["lengths"])
        assert read["lengths"].dtype == np.int32
        assert read["residues"] == written["residues"]


def test_a_mapped_shard_keeps_no_file_open(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"content")
    before = psutil.Process().num_fds()
    shards = [Shard.mapped(tmp_path / "raw") for _ in range(50)]
    assert psutil.Process().num_fds() < before + 10
    del shards


@pytest.mark.parametrize("lengths", [[], [0, 3], [-1, 4], [2], [4], [2**31 - 1], 100 * [1], [-97] + 100 * [1]])
def test_lengths_that_are_not_those_of_the_residues_are_refused(lengths: list[int]) -> None:
    sample = encode_sample({"cluster_id": "c", "lengths": np.array(lengths, np.int32), "residues": b"MKV"})
    shard = Shard(memoryview(struct.pack("<III", 1, 12, 12 + len(sample)) + sample), "the shard")
    with pytest.raises(UserError, match=r"^the shard: sample 0 is damaged \(.*make these shards anew"):
        shard[0]


@pytest.mark.parametrize("content", [b"", b"\1\0", bytes(12), b"\1\0\0\0" + b"\xff" * 20])
def test_a_sample_that_is_none_is_refused(content: bytes) -> None:
    shard = Shard(memoryview(content), "the shard")
    assert len(shard) == content.startswith(b"\1")
    with pytest.raises(UserError, match="the shard: sample 0 is damaged"):
        shard[0]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    writer = ShardWriter(tmp_path_factory.mktemp("shards"), "00000")
    writer.write(sample(3))
    return {"version": 2, "shards": writer.finish()}


ODD = (None, "x", -1, 10**18, 1.5, [], {})
ODD_FIELDS = [
    *((name, value) for name in ("", "raw_data", "zip_data", "compression", "samples") for value in ODD),
    *((name, value) for name in ("version", "format", "column_names", "column_encodings") for value in ODD),
    *((f"{kind}.bytes", value) for kind in ("raw_data", "zip_data") for value in ODD),
    *((f"{kind}.hashes", value) for kind in ("raw_data", "zip_data") for value in ODD if value != {}),
]
NAMES = (
    *(None, 1, "", ".", "..", "index.json", "conversion.json", "shard.00000.00.mds.tmp"),
    *("../shard.1.mds", "/shard.1.mds", "shard./../../x.mds", "a/shard.1.mds"),
    *("shard.1.mds\n", "shard.1\0.mds", "shard.\ud800.mds"),
)


@pytest.mark.parametrize(
    ("field", "value"),
    ODD_FIELDS + [(f"{kind}.basename", name) for kind in ("raw_data", "zip_data") for name in NAMES],
)
def test_an_entry_that_is_no_shards_is_refused(index: dict[str, Any], field: str, value: Any) -> None:
    assert check_index(index, "place") == index["shards"]
    index = copy.deepcopy(index)
    *path, last = ["shards", 0, *filter(None, field.split("."))]
    parent: Any = index
    for key in path:
        parent = parent[key]
    parent[last] = value
    with pytest.raises(UserError, match=r"^place(/index\.json: damaged \(entry 0 .*|: not shards of clusters)"):
        check_index(index, "place")


@pytest.mark.parametrize("missing", ["samples", "zip_data", "compression", "column_names"])
def test_an_entry_without_a_field_is_refused(index: dict[str, Any], missing: str) -> None:
    (entry,) = index["shards"]
    with pytest.raises(UserError, match=f"is not of an MDS shard: '{missing}'"):
        check_index({"shards": [{name: entry[name] for name in entry if name != missing}]}, "place")


def test_a_file_of_two_shards_is_refused(index: dict[str, Any]) -> None:
    (first,) = index["shards"]
    unpacked = {**first["raw_data"], "basename": "shard.1.mds"}
    plain = {**first, "compression": None, "zip_data": None, "raw_data": unpacked}
    assert check_index({"shards": [first, plain]}, "place")
    for shards in ([first, first], [first, plain, plain]):
        with pytest.raises(UserError, match="is listed before"):
            check_index({"shards": shards}, "place")
