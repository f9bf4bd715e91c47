"""mds.py: its shards are Streaming's, byte for byte, and read as Streaming reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zstd
from streaming import MDSWriter

from esm2_composer import mds
from esm2_composer.mds import Shard, ShardWriter
from esm2_composer.records import COLUMNS


def sample(members: int, name: str = "UniRef50_Grün") -> dict[str, Any]:
    lengths = np.random.default_rng(members).integers(1, 4, members).astype(np.int32)
    return {"cluster_id": name, "lengths": lengths, "residues": b"MK" * (int(lengths.sum()) // 2) + b"V"}


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
