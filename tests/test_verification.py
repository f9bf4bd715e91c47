"""verification.py: its statistics follow their definitions, and no damage passes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstd
from conftest import cluster
from raw_data import SPLIT_FILES, bionemo
from streaming import MDSWriter

from esm2_composer.conversion.convert import Options, convert
from esm2_composer.conversion.layouts import BioNeMo
from esm2_composer.conversion.verification import verify
from esm2_composer.data import mds
from esm2_composer.data.mds import COLUMNS, ShardWriter
from esm2_composer.errors import UserError
from esm2_composer.workers import Workers


def test_statistics_of_members_and_of_draws(tmp_path: Path) -> None:
    proteins = {"a": "M" * 8, "b": "M" * 1022, "d": "M" * 1023, "e": "M" * 3000}
    layout = bionemo(tmp_path, {"ur50_id": ["c1", "c2"], "ur90_id": [["a"], ["b", "d", "e"]]}, proteins)
    convert(layout, str(tmp_path / "out"), Options())
    (told,) = verify(str(tmp_path / "out")).values()
    assert verify(str(tmp_path / "out" / "train"))["train"] == told
    assert (told["shards"], told["clusters"], told["members"], told["residues"]) == (1, 2, 4, 5053)
    assert list(told["length_percentiles"].values()) == [8, 8, 8, 1022, 1023, 3000, 3000]
    assert told["share_over_1022"] == 0.5
    assert told["padding_at_1024"] == pytest.approx((1014 / 1024) / 2)  # c1 shows 10 tokens, c2 always 1,024


def test_progress_is_told_of_each_split(tmp_path: Path) -> None:
    for split, name in (("train", "a"), ("valid", "b")):
        layout = bionemo(tmp_path / split, {"ur50_id": [name]}, {name: "MK"})
        convert(layout, str(tmp_path / "out"), Options(split))
    told: list[tuple[str, int, int]] = []
    verify(str(tmp_path / "out"), progress=lambda *done: told.append(done))
    assert told == [("shards of train", 1, 1), ("shards of valid", 1, 1)]


def test_no_process_is_started_for_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(bionemo(tmp_path, {"ur50_id": ["a"]}, {"a": "MK"}), str(tmp_path / "out"), Options())
    monkeypatch.setattr(Workers, "submit", lambda *_: pytest.fail("a process is started"))
    assert verify(str(tmp_path / "out"), workers=4)["train"]["shards"] == 1


@pytest.mark.parametrize("name", ["conversion.json", "cluster_ids.parquet"])
def test_what_cannot_be_compared_is_told(tmp_path: Path, name: str) -> None:
    convert(bionemo(tmp_path, {"ur50_id": ["a"]}, {"a": "MK"}), str(tmp_path / "out"), Options())
    assert verify(str(tmp_path / "out"))["train"]["absent"] == []
    (tmp_path / "out/train" / name).unlink()
    assert verify(str(tmp_path / "out"))["train"]["absent"] == [name]


def test_a_split_without_clusters_is_none(tmp_path: Path) -> None:
    convert(bionemo(tmp_path, {"ur50_id": ["a"]}, {"a": "MK"}), str(tmp_path / "out"), Options())
    split = tmp_path / "out/train"
    (split / "index.json").write_text('{"version": 2, "shards": []}')
    counts = {f"{name}_written": 0 for name in ("clusters", "members", "residues")}
    (split / "conversion.json").write_text(
        json.dumps(json.loads((split / "conversion.json").read_text()) | counts)
    )
    for _ in range(2):
        with pytest.raises(UserError, match="train: its shards hold no cluster"):
            verify(str(split))
        (split / "conversion.json").unlink(missing_ok=True)


@pytest.mark.parametrize(("split", "over", "padding"), [("train", 0.0195, 0.725), ("valid", 0.05, 0.743)])
def test_statistics_of_real_data_are_those_in_its_readme(
    real_data: Path, tmp_path: Path, split: str, over: float, padding: float
) -> None:
    layout = BioNeMo(*(real_data / "tiny" / file for file in SPLIT_FILES[split]))
    convert(layout, str(tmp_path), Options(split))
    told = verify(str(tmp_path), workers=1 + (split == "train"))[split]
    assert told["share_over_1022"] == pytest.approx(over, abs=5e-5)
    assert told["padding_at_1024"] == pytest.approx(padding, abs=5e-4)


def edit_index(split: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((split / "index.json").read_text())
    change(index)
    (split / "index.json").write_text(json.dumps(index))


RAW = "shard.00000.00.mds"
PACKED = f"{RAW}.zstd"


def rewrite(split: Path, old: bytes, new: bytes) -> None:
    """Put other content into the shard, with hashes that fit."""
    raw = zstd.decompress((split / PACKED).read_bytes())
    assert raw.count(old) == 1
    raw = raw.replace(old, new)
    pack(split, raw)
    edit_index(split, lambda index: index["shards"][0].update(raw_data=mds._file(RAW, raw)))


def pack(split: Path, raw: bytes) -> None:
    packed = zstd.compress(raw)
    (split / PACKED).write_bytes(packed)
    edit_index(split, lambda index: index["shards"][0].update(zip_data=mds._file(PACKED, packed)))


def forget_hashes(split: Path) -> None:
    """As MDSWriter writes it by default; and what is packed is damaged."""
    edit_index(
        split, lambda index: [index["shards"][0][kind].update(hashes={}) for kind in ("raw_data", "zip_data")]
    )
    (split / PACKED).write_bytes(bytes((split / PACKED).stat().st_size))


def put_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cannot be read": lambda split: (split / PACKED).unlink(),
    f"{PACKED}: not a regular file": lambda split: put_pipe(split / PACKED),
    "index.json: not a regular file": lambda split: put_folder(split / "index.json"),
    "it has 1 bytes, by index.json": lambda split: (split / PACKED).write_bytes(b"x"),
    "its xxh64 is not that of index.json": lambda split: (split / PACKED).write_bytes(
        bytes((split / PACKED).stat().st_size)
    ),
    "mds.zstd: its xxh64 is not that of": lambda split: edit_index(
        split, lambda index: index["shards"][0]["raw_data"]["hashes"].update(xxh64="0" * 16)
    ),
    "it does not unpack to the 77 bytes of index.json": lambda split: edit_index(
        split, lambda index: index["shards"][0]["raw_data"].update(bytes=77)
    ),
    "bytes of index.json (ZSTD decompression failed: Destination buffer is too small)": lambda split: pack(
        split, bytes(2**25)
    ),
    "mds.zstd: md6 is not a supported hash algorithm": lambda split: edit_index(
        split, lambda index: index["shards"][0]["zip_data"]["hashes"].update(md6="0")
    ),
    "entry 0 is not of an MDS shard: zip_data.basename": lambda split: edit_index(
        split, lambda index: index["shards"][0].update(compression="gzap")
    ),
    "bytes of index.json (": forget_hashes,
    "sample 1 is damaged ('utf-8' codec can't decode": lambda split: rewrite(split, b"c1", b"\xff1"),
    "sample 1 is damaged (buffer size must be": lambda split: rewrite(split, b"c1\4", b"c1\5"),
    "lengths of c1 do not add up to its residues": lambda split: rewrite(
        split, b"\x05\0\0\0MKVLA", b"\x04\0\0\0MKVLA"
    ),
    "c1 holds letters that are no residues": lambda split: rewrite(split, b"MKVLA", b"MK-LA"),
    "0 clusters, but conversion.json says 2": lambda split: edit_index(
        split, lambda index: index["shards"].clear()
    ),
    "not shards of clusters; their columns are name (str)": lambda split: edit_index(
        split, lambda index: index["shards"][0].update(column_names=["name"], column_encodings=["str"])
    ),
    "2 samples, but index.json says 1": lambda split: edit_index(
        split, lambda index: index["shards"][0].update(samples=1)
    ),
    "index.json: damaged (entry 1 is not of an MDS shard: shard.00000.00.mds is listed before)": (
        lambda split: edit_index(split, lambda index: index["shards"].extend(index["shards"]))
    ),
    "cluster_ids.parquet: not the ids of the clusters in the shards": lambda split: pq.write_table(
        pa.table({"cluster_id": ["c1", "c3"]}), split / "cluster_ids.parquet"
    ),
    "cluster_ids.parquet: its xxh64 is not that of conversion.json": lambda split: pq.write_table(
        pa.table({"cluster_id": ["c2", "c1"]}), split / "cluster_ids.parquet"
    ),
    "cluster_ids.parquet: damaged (no column cluster_id of strings)": lambda split: pq.write_table(
        pa.table({"cluster_id": [1, 2]}), split / "cluster_ids.parquet"
    ),
    "parquet: damaged (no column cluster_id": lambda split: pq.write_table(
        pa.table({"id": ["c1", "c2"]}), split / "cluster_ids.parquet"
    ),
    "cluster_ids.parquet: not a parquet file": lambda split: (split / "cluster_ids.parquet").write_bytes(b"x"),
    "2 clusters, but conversion.json says None": lambda split: (split / "conversion.json").write_text(
        '{"clusters_written": null}'
    ),
    "index.json: damaged (it holds no names": lambda split: (split / "index.json").write_text("[]"),
    "index.json: damaged (it lists no shards)": lambda split: (split / "index.json").write_text('{"version": 2}'),
    "2 clusters, but conversion.json says 0": lambda split: (split / "conversion.json").write_text('{"x": 1}'),
    "index.json: damaged (Exp": lambda split: (split / "index.json").write_text("{"),
    "index.json: damaged (maximum recursion": lambda split: (split / "index.json").write_text("[" * 10**5),
    "no finished shards": lambda split: (split / "index.json").unlink(),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_found(tmp_path: Path, message: str) -> None:
    layout = bionemo(tmp_path, {"ur50_id": ["c1", "c2"]}, {"c1": "MKVLA", "c2": "MKQ"})
    convert(layout, str(tmp_path / "out"), Options())
    assert verify(str(tmp_path / "out"))["train"]["members"] == 2
    DAMAGE[message](tmp_path / "out" / "train")
    with pytest.raises(UserError) as caught:
        verify(str(tmp_path / "out"))
    assert message in str(caught.value)


def test_a_split_under_the_others_name_is_refused(tmp_path: Path) -> None:
    convert(bionemo(tmp_path, {"ur50_id": ["a"]}, {"a": "MK"}), str(tmp_path / "out"), Options())
    shutil.copytree(tmp_path / "out/train", tmp_path / "out/valid")
    with pytest.raises(UserError, match=r"out/valid: train shards, by conversion\.json; convert anew"):
        verify(str(tmp_path / "out"))
    (tmp_path / "out/valid").rename(tmp_path / "another")
    assert verify(str(tmp_path / "another"))["another"]["clusters"] == 1


def test_shards_without_compression_are_verified_as_they_are_read(tmp_path: Path) -> None:
    with MDSWriter(out=str(tmp_path / "valid"), columns=COLUMNS) as writer:
        writer.write(cluster(b"MKV"))
    assert verify(str(tmp_path))["valid"]["residues"] == 3


def test_shards_of_others_are_verified_without_a_conversion_json(tmp_path: Path) -> None:
    layout = bionemo(tmp_path, {"ur50_id": ["c1"]}, {"c1": "MKVLA"})
    convert(layout, str(tmp_path / "out"), Options())
    (tmp_path / "out/train/conversion.json").unlink()
    assert verify(str(tmp_path / "out"))["train"]["residues"] == 5
    assert ShardWriter(tmp_path, "x").finish() == []
