"""Shards stay mapped, datasets are opened one at a time, and workers read one order of an epoch."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_loaders import BATCH, DRAW, contents
from streaming import StreamingDataset
from streaming.base.constant import EPOCH_DATA
from streaming.base.shared import _get_path
from streaming.base.spanner import Spanner

from esm2_composer.data import shards
from esm2_composer.data.loaders import evaluation_loader, train_loader
from esm2_composer.data.shards import SHARED_MEMORY, ShardBounds
from esm2_composer.errors import UserError


def test_shards_stay_mapped_and_are_not_locked_again_unless_they_may_be_evicted(
    fresh: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = []
    prepare = StreamingDataset.prepare_shard
    monkeypatch.setattr(
        StreamingDataset, "prepare_shard", lambda self, *args: prepared.append(args[0]) or prepare(self, *args)
    )
    loader = train_loader(DRAW, None, fresh(), BATCH, num_workers=0)
    contents(loader)
    assert set(prepared) == set(range(len(loader.dataset.shards)))
    prepared.clear()
    contents(loader)
    assert prepared == []


def test_a_shard_that_does_not_stay_is_an_error_that_names_the_setting(
    fresh: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = train_loader(DRAW, None, fresh(), BATCH, num_workers=0)
    monkeypatch.setattr(loader.dataset, "prepare_shard", lambda shard_id: None)
    loader.dataset.cache_limit = 10_000
    with pytest.raises(UserError, match=r"evicted again; data\.cache_limit is too low"):
        loader.dataset[0]


def test_a_shard_that_must_not_be_read_is_named(fresh: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fresh()
    loader = train_loader(DRAW, None, folder, BATCH, num_workers=0)
    packed = f"{folder}/shard.00000.mds.zstd"

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, f"Failed to open local file '{path}'")  # as Arrow does

    def refuse_packed(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", packed)

    monkeypatch.setattr(StreamingDataset, "prepare_shard", refuse_packed)
    with pytest.raises(UserError, match=f"{packed}: Permission denied"):
        loader.dataset[0]
    monkeypatch.setattr(shards.Shard, "mapped", refuse)
    with pytest.raises(UserError, match=r"shard\.\d+\.mds: cannot be read \(Permission denied\)"):
        loader.dataset[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_does_not_just_end_when_shards_cannot_be_fetched(
    fresh: Callable[[], str], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def fail(self: StreamingDataset, *_: object) -> None:
        raise OSError("no more locks")

    monkeypatch.setattr(StreamingDataset, "prepare_shard", fail)
    loader = train_loader(DRAW, None, fresh(), BATCH, workers)
    with pytest.raises((RuntimeError, OSError), match=r"shards cannot be fetched|no more locks"):
        contents(loader)


def test_a_worker_waits_for_no_other_that_failed(fresh: Callable[[], str], tmp_path: Path) -> None:
    source = Path(fresh())
    for damaged in source.glob("*.zstd"):
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    dataset = evaluation_loader(DRAW, str(source), str(tmp_path / "cache"), BATCH, 0).dataset.clusters
    for _ in range(2):  # the second as another worker would
        with pytest.raises(UserError, match="cannot be read"):
            dataset.prepare_shard(0)


def test_a_dataset_is_opened_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shards, "OPENING_SECONDS", 0.2)
    inside = threading.Event()

    def another_run() -> None:
        with shards.opening_alone():
            inside.set()
            time.sleep(0.1)
            inside.clear()

    other = threading.Thread(target=another_run)
    other.start()
    assert inside.wait(10)
    with shards.opening_alone():
        assert not inside.is_set()
        start = time.monotonic()
        with shards.opening_alone():  # as by a run that hangs: it is not waited for without end
            assert time.monotonic() - start > 0.1
    other.join()


def orders_held(process: int) -> int:
    """How many epochs' orders a process has mapped, all of files without a name, which go with it."""
    maps = Path(f"/proc/{process}/maps").read_text().splitlines()
    orders = [line for line in maps if EPOCH_DATA in line]
    assert all(line.endswith("(deleted)") for line in orders)
    return len(orders)


def test_workers_read_one_order_of_an_epoch_where_it_lies(fresh: Callable[[], str]) -> None:
    inherited = orders_held(os.getpid())
    loader = train_loader(DRAW, None, fresh(), BATCH, num_workers=2)
    for _ in range(3):
        batches = iter(loader)
        next(batches)
        deadline = time.monotonic() + 30  # the second worker may just be on its way
        while (held := [orders_held(each.pid) - inherited for each in batches._workers]) != [1, 1]:
            assert time.monotonic() < deadline, f"that of the epoch before is not given back: {held}"
        assert [*batches]
    assert not (SHARED_MEMORY / _get_path(loader.dataset._shm_prefix_int, EPOCH_DATA)).exists()


def test_what_a_killed_run_left_of_an_order_is_none_of_the_next(fresh: Callable[[], str], tmp_path: Path) -> None:
    loader = train_loader(DRAW, None, fresh(), BATCH, num_workers=0)
    left, other = SHARED_MEMORY / _get_path(loader.dataset._shm_prefix_int, EPOCH_DATA), tmp_path / "other"
    other.write_text("kept")
    left.symlink_to(other)
    assert [*loader]
    assert not left.exists()
    assert other.read_text() == "kept"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_order_that_shared_memory_has_no_room_for_is_told_by_all(
    fresh: Callable[[], str], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Zeros(np.ndarray):
        def tofile(self, file: Any) -> None:
            file.write(b"0000")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards.np, "zeros", lambda shape, dtype: np.empty(shape, dtype).view(Zeros))
    loader = train_loader(DRAW, None, fresh(), BATCH, num_workers=workers)
    batches = iter(loader)
    for _ in range(max(workers, 1)):  # each worker tells it, rather than wait for another
        with pytest.raises(UserError, match=f"{SHARED_MEMORY} has no room for the order of an epoch, 1 MiB"):
            next(batches)
    assert not (SHARED_MEMORY / _get_path(loader.dataset._shm_prefix_int, EPOCH_DATA)).exists()


def test_shard_bounds_find_every_sample_as_streaming_does() -> None:
    sizes = np.array([3, 1, 7, 2])
    ours, theirs = ShardBounds(sizes), Spanner(sizes)
    assert [ours[i] for i in range(13)] == [theirs[i] for i in range(13)]
    assert ours[np.int64(4)] == (2, 0)
    for bounds, none in itertools.product((ours, theirs), (-1, 13)):
        with pytest.raises(IndexError):
            bounds[none]


def test_a_dataset_builds_no_spanner_of_streamings(
    fresh: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Spanner, "__init__", lambda *_: pytest.fail("8 bytes a sample in each rank"))
    assert isinstance(train_loader(DRAW, None, fresh(), BATCH, num_workers=0).dataset.spanner, ShardBounds)


OPEN_AND_DIE = """
import os, signal, sys
from esm2_composer.data.loaders import train_loader
from small_loaders import DRAW
loader = train_loader(DRAW, *sys.argv[1:], 8, num_workers=0)
os.killpg(0, signal.SIGKILL)
"""


def test_a_run_killed_before_it_read_a_split_does_not_hold_its_cache(
    fresh: Callable[[], str], tmp_path: Path
) -> None:
    place = fresh(), str(tmp_path / "cache")
    died = subprocess.run(
        [sys.executable, "-c", OPEN_AND_DIE, *place], cwd=Path(__file__).parent, start_new_session=True
    )
    assert died.returncode == -signal.SIGKILL
    assert len(contents(train_loader(DRAW, *place, BATCH, num_workers=0))) > 0
