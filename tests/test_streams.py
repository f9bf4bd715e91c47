"""Shards from an object store over HTTP, evicted and fetched again; damage found, mended once, and named."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from botocore.exceptions import EndpointConnectionError
from conftest import cluster
from moto.server import ThreadedMotoServer
from small_loaders import BATCH, DRAW, contents
from streaming import MDSWriter
from streaming.base.storage.download import S3Downloader
from torch.utils.data import DataLoader

from esm2_composer import retry
from esm2_composer.data.loaders import cache_needed, evaluation_loader, train_loader
from esm2_composer.data.mds import COLUMNS
from esm2_composer.errors import StoreUnavailable, TransientError, UserError


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some thirty shards of 4 kB."""
    out = tmp_path_factory.mktemp("many") / "train"
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", np.uint8)
    with MDSWriter(out=str(out), columns=COLUMNS, compression="zstd", hashes=["xxh64"], size_limit=4000) as writer:
        for i in range(800):
            writer.write(cluster(rng.choice(letters, 100).tobytes(), name=str(i)))
    return out


@pytest.fixture
def bucket(many: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of the shards in an S3 bucket on loopback."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "S3_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="proteins")
    for file in many.iterdir():
        client.upload_file(str(file), "proteins", f"train/{file.name}")
    yield "s3://proteins/train"
    server.stop()


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_shards_stream_from_s3_through_a_cache_too_small_for_them(
    bucket: str, many: Path, tmp_path: Path, workers: int
) -> None:
    local = train_loader(DRAW, None, str(shutil.copytree(many, tmp_path / "copy")), 32, num_workers=0)
    cache, limit = tmp_path / "cache", 60_000
    remote = train_loader(DRAW, bucket, str(cache), 32, workers, cache_limit=f"{limit}b")
    for _ in range(2):
        assert contents(remote) == contents(local)
        kept = list(cache.glob("*.mds"))
        assert 0 < len(kept) < len(list(many.glob("*.mds.zstd")))
        assert sum(file.stat().st_size for file in kept) <= limit


@pytest.mark.parametrize("limit", ["1b", "2000b"])
def test_a_cache_limit_with_which_nothing_can_be_read_is_no_fault_of_the_shards(
    many: Path, tmp_path: Path, limit: str
) -> None:
    with pytest.raises(UserError, match=rf"^data\.cache_limit {limit}: "):
        train_loader(DRAW, str(many), str(tmp_path / "cache"), 32, num_workers=0, cache_limit=limit)


@pytest.mark.parametrize("enough", [True, False])
def test_a_cache_limit_below_what_is_in_use_at_a_time_is_told(
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture, enough: bool
) -> None:
    needed = cache_needed(train_loader(DRAW, str(many), str(tmp_path / "a"), 32, num_workers=0).dataset)
    assert capsys.readouterr().err == ""
    sizes = [file["raw_data"]["bytes"] for file in json.loads((many / "index.json").read_text())["shards"]]
    assert sum(sizes) < needed < 1.2 * sum(sizes), "of so few, all are in use"
    limit = f"{needed if enough else needed - 1}b"
    train_loader(DRAW, str(many), str(tmp_path / "b"), 32, num_workers=0, cache_limit=limit)
    told = (
        f"data.cache_limit {limit} has no room for the shards in use at a time, so each will be fetched many times"
    )
    assert capsys.readouterr().err == ("" if enough else f"{told}; give it 1mb\n")


def test_a_damaged_file_in_the_cache_is_fetched_again(bucket: str, many: Path, tmp_path: Path) -> None:
    local = train_loader(DRAW, None, str(shutil.copytree(many, tmp_path / "copy")), 32, num_workers=0)
    cache = shutil.copytree(many, tmp_path / "cache")
    packed = sorted(cache.glob("*.zstd"))
    packed[0].write_bytes(packed[0].read_bytes()[:-9])  # cut short
    packed[1].write_bytes(packed[1].read_bytes()[:-1] + b"?")  # one byte wrong
    assert contents(train_loader(DRAW, bucket, str(cache), 32, num_workers=0)) == contents(local)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_file_damaged_after_it_was_unpacked_is_made_anew(
    bucket: str, many: Path, tmp_path: Path, in_place: bool
) -> None:
    expected = contents(train_loader(DRAW, None, str(shutil.copytree(many, tmp_path / "copy")), 32, num_workers=0))
    remote, folder = (None, shutil.copytree(many, tmp_path / "a")) if in_place else (bucket, tmp_path / "a")
    contents(train_loader(DRAW, remote, str(folder), 32, num_workers=0))
    again = shutil.copytree(folder, tmp_path / "b")  # Streaming opens a folder only once in a process
    for path, damage in zip(sorted(again.glob("*.mds")), (slice(-50, None), slice(4, 60), slice(0)), strict=False):
        raw = bytearray(path.read_bytes())
        raw[damage] = b"\xff" * len(raw[damage]) or b"one byte more"
        path.write_bytes(raw)
    assert contents(train_loader(DRAW, remote, str(again), 32, num_workers=0)) == expected


def test_a_packed_file_that_is_gone_is_named_and_the_unpacked_one_stays(many: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(many, tmp_path / "a")
    contents(train_loader(DRAW, None, str(folder), 32, num_workers=0))
    again = shutil.copytree(folder, tmp_path / "b")
    gone = min(again.glob("*.zstd"))
    gone.unlink()
    with pytest.raises(UserError, match=f"{gone}: not there"):
        train_loader(DRAW, None, str(again), 32, num_workers=0)
    assert gone.with_suffix("").exists()


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_store_that_is_away_is_waited_for_and_is_no_mistake(
    bucket: str, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    fetch, failures = S3Downloader.download, itertools.count()

    def fetch_sometimes(*arguments: object) -> None:
        if not comes_back or next(failures) % 3:
            raise EndpointConnectionError(endpoint_url="nowhere")
        fetch(*arguments)

    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    loader = train_loader(DRAW, bucket, str(tmp_path / "cache"), 32, num_workers=0)
    monkeypatch.setattr(S3Downloader, "download", fetch_sometimes)
    if comes_back:
        local = train_loader(DRAW, None, str(shutil.copytree(many, tmp_path / "copy")), 32, num_workers=0)
        assert contents(loader) == contents(local)
        assert {1, 2} <= set(waits)
        return
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        contents(loader)
    assert sum(waits) >= 30
    with pytest.raises(StoreUnavailable, match=r"index\.json cannot be reached"):
        train_loader(DRAW, bucket, str(tmp_path / "other"), 32, num_workers=0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("writer", ["shutil.copy", "streaming.base.stream.decompress"])
def test_a_full_disk_is_named_at_once_and_is_no_mistake(
    fresh: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, workers: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    source, cache = fresh(), str(tmp_path / "cache")
    loader = train_loader(DRAW, source, cache, BATCH, workers)
    monkeypatch.setattr(writer, fail)
    monkeypatch.setattr(retry, "WAITS", ())
    with pytest.raises(
        TransientError, match=rf"^{cache}: no room for shards \(Disk quota exceeded\).* data\.local "
    ):
        contents(loader)
    if writer == "shutil.copy":
        with pytest.raises(TransientError, match=r"other: no room for shards"):
            train_loader(DRAW, source, str(tmp_path / "other"), BATCH, workers)


def test_a_store_that_refuses_is_not_asked_again(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be opened"):
        train_loader(DRAW, "s3://no-such-bucket/train", str(tmp_path / "cache"), 32, num_workers=0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("open_loader", [train_loader, evaluation_loader])
def test_a_shard_damaged_at_its_source_is_named(
    open_loader: Callable[..., DataLoader], fresh: Callable[[], str], tmp_path: Path, workers: int
) -> None:
    source = Path(fresh())
    damaged = sorted(source.glob("*.zstd"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    loader = open_loader(DRAW, str(source), str(tmp_path / "cache"), BATCH, workers)
    with pytest.raises(UserError, match=rf"^{damaged}: cannot be read \(Checksum failure"):
        contents(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_read_in_place_is_named_and_left(fresh: Callable[[], str], workers: int) -> None:
    folder = Path(fresh())
    damaged = sorted(folder.glob("*.zstd"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=f"^{damaged}: damaged"):
        contents(train_loader(DRAW, None, str(folder), BATCH, workers))
    assert damaged.exists()


def test_a_shard_of_the_wrong_size_is_named_before_training(fresh: Callable[[], str]) -> None:
    folder = Path(fresh())
    damaged = sorted(folder.glob("*.zstd"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{damaged}: damaged .* bytes instead of"):
        train_loader(DRAW, None, str(folder), BATCH, 0)


def edit_entry(folder: Path, **changes: Any) -> dict[str, Any]:
    """Change the second shard's entry in index.json, or what is nested in it; the entry as it was."""
    index = json.loads((folder / "index.json").read_text())
    before = index["shards"][1]
    nested = {name: {**before[name], **value} for name, value in changes.items() if isinstance(value, dict)}
    index["shards"][1] = {**before, **changes, **nested}
    (folder / "index.json").write_text(json.dumps(index))
    return before


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["../precious", "{}/precious", "index.json", "shard.00000.mds"])
@pytest.mark.parametrize("kind", ["raw_data", "zip_data"])
def test_an_index_that_names_other_files_costs_none(
    fresh: Callable[[], str], tmp_path: Path, kind: str, name: str, cached: bool
) -> None:
    folder, cache = fresh(), tmp_path / "cache"
    (tmp_path / "precious").write_text("kept")
    name = name.format(tmp_path)
    edit_entry(Path(folder), **{kind: {"basename": name, "bytes": 1}})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=rf"^{folder}/index\.json: damaged \(entry 1 "):
        evaluation_loader(DRAW, *((folder, str(cache)) if cached else (None, folder)), BATCH, 0)
    (cache / "index.json").unlink(missing_ok=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("more", [-1, 1])
@pytest.mark.parametrize("open_loader", [train_loader, evaluation_loader])
def test_another_count_of_samples_than_the_shards_is_named(
    open_loader: Callable[..., DataLoader], fresh: Callable[[], str], more: int
) -> None:
    folder = fresh()
    samples = edit_entry(Path(folder))["samples"]
    edit_entry(Path(folder), samples=samples + more)
    with pytest.raises(UserError, match=rf"mds: {samples} samples, but index\.json says {samples + more}"):
        contents(open_loader(DRAW, None, folder, BATCH, 0))


def test_a_shard_to_fetch_without_a_hash_is_named(fresh: Callable[[], str], tmp_path: Path) -> None:
    folder = fresh()
    name = edit_entry(Path(folder), zip_data={"hashes": {}})["zip_data"]["basename"]
    with pytest.raises(UserError, match=rf"^{folder}/{name}: cannot be read \(Hash algorithm"):
        contents(evaluation_loader(DRAW, folder, str(tmp_path / "cache"), BATCH, 0))
