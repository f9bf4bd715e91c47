"""conversion/convert.py and work.py: what is there already; whatever stops a conversion, or damages its work."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import psutil
import pytest
from conftest import ROOT
from raw_data import (
    bionemo,
    flip,
    hashes,
    members_of,
    random_data,
    read_split,
    two_clusters,
    write_layout,
    write_proteins,
)

from esm2_composer.conversion import convert as conversion
from esm2_composer.conversion import parts
from esm2_composer.conversion import plan as conversion_plan
from esm2_composer.conversion.convert import Interrupted, Options, convert
from esm2_composer.conversion.destinations import LocalSplit
from esm2_composer.conversion.layouts import BioNeMo, Fasta
from esm2_composer.conversion.plan import make_plan
from esm2_composer.errors import UserError

# --- what is there already ---


def test_a_finished_split_is_left_alone(tmp_path: Path) -> None:
    layout = two_clusters(tmp_path)
    first = convert(layout, str(tmp_path / "out"), Options())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = convert(layout, str(tmp_path / "out"), Options())
    assert again == {**first, "already_done": True}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    with pytest.raises(UserError, match=r"exists already.*options\.seed was 0, is 1"):
        convert(layout, str(tmp_path / "out"), Options(seed=1))
    with pytest.raises(UserError, match=r"inputs\.clusters\.0\.path was .*, is "):
        convert(two_clusters(tmp_path / "other"), str(tmp_path / "out"), Options())
    (tmp_path / "f").write_text(">a\nMK\n")
    with pytest.raises(
        UserError, match="of another conversion: inputs were clusters, sequences, are fasta; remove it"
    ):
        convert(Fasta([tmp_path / "f"]), str(tmp_path / "out"), Options())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize("name", ["clusters_written", "members_written", "residues_written", "state"])
def test_a_finished_split_whose_counts_are_lost_is_refused(tmp_path: Path, name: str) -> None:
    layout = two_clusters(tmp_path)
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
        convert(two_clusters(tmp_path), str(tmp_path / "out"), Options())
    assert sorted(tmp_path.glob("out/**/*")) == sorted([out, *(out / name for name in files)])


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file is a file; it must be a folder"):
        convert(two_clusters(tmp_path), str(tmp_path / "file"), Options())
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)"):
        convert(two_clusters(tmp_path / "again"), str(tmp_path / "file/inside"), Options())


# --- interruptions ---

CONVERT = """
import sys
import time
import weakref
from pathlib import Path
from esm2_composer.conversion import convert as conversion, plan as conversion_plan, parts
from esm2_composer.conversion.layouts import BioNeMo
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
    for _ in range(2):
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
        convert(two_clusters(tmp_path), str(tmp_path / "out"), Options())


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"out/\.train\.work: cannot be made and locked \(No locks available\)"):
        convert(two_clusters(tmp_path), str(tmp_path / "out"), Options())
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
    monkeypatch.setattr("esm2_composer.conversion.work.SECONDS_TO_STOP", 10 if stops else 0.1)
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


@pytest.fixture
def cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Any]]:
    """A conversion to tmp_path / "out" that was stopped just before its final rename; goes on with it."""
    monkeypatch.setattr(conversion_plan, "PART_CLUSTERS", 16)
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
    layout = two_clusters(tmp_path)
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
