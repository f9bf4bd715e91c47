"""data/checks.py: what is wrong with shards, caches and TMPDIR is found before anything is opened."""

from __future__ import annotations

import contextlib
import json
import multiprocessing.connection
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from streaming import StreamingDataset
from streaming.base.storage.download import LocalDownloader
from test_draw import DRAW

from esm2_composer.data.checks import (
    LONGEST_TMPDIR,
    check_cache,
    check_places_of_workers,
    check_store,
    count_short_clusters,
)
from esm2_composer.data.loaders import train_loader
from esm2_composer.data.splits import count_clusters
from esm2_composer.errors import StoreUnavailable, UserError
from esm2_composer.recipe.schema import DataSection


def test_clusters_that_are_all_short_are_counted(shards: Path, tmp_path: Path) -> None:
    dataset = train_loader(DRAW, str(shards / "train"), str(tmp_path), 8, num_workers=0).dataset
    longest = [max(StreamingDataset.get_item(dataset, i)["lengths"]) for i in range(dataset.num_samples)]
    for min_length in (1, min(longest), min(longest) + 1, int(np.median(longest)), 1022):
        short = sum(length < min_length for length in longest)
        assert count_short_clusters(str(shards / "train"), min_length) == short
    assert count_short_clusters(str(shards / "train"), 1023) is None
    assert count_short_clusters(str(shards), 5) is None


@pytest.mark.parametrize("longest", [[], None, "x", {"x": 1}, {"3": "x"}, {"3": None}])
def test_a_conversion_json_of_other_content_counts_no_clusters(tmp_path: Path, longest: Any) -> None:
    (tmp_path / "conversion.json").write_text(json.dumps({"longest_members": longest}))
    assert count_short_clusters(str(tmp_path), 5) is None


def test_a_cache_of_the_remotes_own_shards_is_taken_and_others_are_refused(written: Path, tmp_path: Path) -> None:
    for split in ("train", "valid"):
        shutil.copytree(written, tmp_path / "remote" / split)
    data = DataSection(str(tmp_path / "remote"), str(tmp_path / "cache"))
    check_cache(data)
    shutil.copytree(tmp_path / "remote", tmp_path / "cache")
    check_cache(data)
    index = tmp_path / "cache/valid/index.json"
    index.write_text(index.read_text() + " ")
    check_cache(data, ["train"])
    with pytest.raises(UserError, match=f"data.local {data.local} holds other valid shards than data.remote"):
        check_cache(data)
    shutil.rmtree(tmp_path / "remote")
    with pytest.raises(UserError, match="remote/train: cannot be opened as MDS shards"):
        check_cache(data)


@pytest.mark.parametrize(("more", "works"), [(0, True), (1, False)])
def test_a_tmpdir_too_long_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch, more: int, works: bool) -> None:
    data, shorter = DataSection("shards", num_workers=1), len(f"{tempfile.gettempdir()}/12345678")
    with tempfile.TemporaryDirectory(prefix="n" * (LONGEST_TMPDIR + more - shorter)) as folder:
        Path(folder, "pymp-12345678").mkdir()
        with contextlib.nullcontext() if works else pytest.raises(OSError, match="too long"):
            multiprocessing.connection.Listener(f"{folder}/pymp-12345678/listener-12345678").close()
        monkeypatch.setattr(tempfile, "tempdir", folder)
        with contextlib.nullcontext() if works else pytest.raises(UserError, match="too long for the sockets"):
            check_places_of_workers(data)
        check_places_of_workers(replace(data, num_workers=0))


def test_a_tmpdir_that_python_does_without_is_told(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for wanted, told in ((tmp_path, ""), ("/none", f"TMPDIR /none cannot be written; taking {tmp_path}\n")):
        monkeypatch.setenv("TMPDIR", str(wanted))
        check_places_of_workers(DataSection("shards", num_workers=0))
        assert capsys.readouterr().err == told


def test_shared_memory_without_room_for_loader_processes_is_told(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=0, free=0))
    check_places_of_workers(DataSection("shards", num_workers=1))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=2**16, free=2**16))
    with pytest.raises(UserError, match=r"/dev/shm is full, .* or set data.num_workers=0"):
        check_places_of_workers(DataSection("shards", num_workers=1))
    check_places_of_workers(DataSection("shards", num_workers=0))


def test_what_lies_in_a_store_is_looked_at_before_a_run(written: Path, tmp_path: Path) -> None:
    data = DataSection(str(tmp_path / "remote"), str(tmp_path / "cache"))
    shutil.copytree(written, tmp_path / "remote/train")
    clusters = count_clusters((written / "index.json").read_bytes())
    with pytest.raises(UserError, match="remote/valid: cannot be opened as MDS shards"):
        check_store(data, clusters)
    shutil.copytree(written, tmp_path / "remote/valid")
    check_store(data, clusters)
    with pytest.raises(UserError, match=f"train holds {clusters} clusters, fewer than one global_"):
        check_store(data, clusters + 1)
    conversion = {"state": {"options": {"split": "train"}}}
    (tmp_path / "remote/valid/conversion.json").write_text(json.dumps(conversion))
    with pytest.raises(UserError, match="remote/valid: train shards, by conversion"):
        check_store(data, clusters)
    (tmp_path / "remote/train/index.json").write_text("{}")
    with pytest.raises(UserError, match=r"remote/train/index\.json is no index of MDS shards"):
        check_store(data, clusters)
    assert not (tmp_path / "cache").exists()


def test_a_store_that_is_away_while_the_cache_is_compared_is_waited_for(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "valid"):
        shutil.copytree(written, tmp_path / "cache" / split)

    def away(*_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("esm2_composer.retry.WAITS", (0,))
    monkeypatch.setattr(LocalDownloader, "_download_file_impl", away)
    with pytest.raises(StoreUnavailable, match="no route to host"):
        check_cache(DataSection(str(tmp_path / "remote"), str(tmp_path / "cache")))
    assert capsys.readouterr().err.endswith("no route to host); trying again in 0 s\n")
