"""Both kinds of folder list whole checkpoints only, and are one run's at a time."""

import errno
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from save_folders import listing, save, stage

from esm2_composer.checkpoints import local
from esm2_composer.checkpoints.folders import ask, open_folder
from esm2_composer.checkpoints.local import LocalFolder
from esm2_composer.checkpoints.names import LATEST
from esm2_composer.errors import TransientError, UserError


@pytest.mark.parametrize("end", ["-rank0.pt", ""])
def test_checkpoints_are_listed_by_their_updates_and_removed_alone(folder, tmp_path, end):
    for update in (10, 9, 100, 1):
        save(folder, tmp_path, f"ep0-ba{update}{end}")
    assert folder.names() == [f"ep0-ba{update}{end}" for update in (1, 9, 10, 100)]
    folder.remove(f"ep0-ba1{end}")
    assert folder.names() == [f"ep0-ba{update}{end}" for update in (9, 10, 100)]


def test_a_sharded_checkpoint_is_there_when_the_last_part_is(folder, tmp_path):
    save(folder, tmp_path, "ep0-ba10")
    save(folder, tmp_path, "ep0-ba20", whole=False)
    assert folder.names() == ["ep0-ba10"]
    folder.clear()  # the next start does
    assert not any("ba20" in name for name in listing(folder))


def test_a_sharded_checkpoint_that_lacks_a_part_after_a_copy_is_skipped_and_kept(folder, tmp_path):
    save(folder, tmp_path, "ep0-ba10")
    staged = stage(tmp_path, "ep0-ba20")
    (staged / ".metadata").write_bytes(b"...__0_0.distcp...__1_0.distcp...")
    folder.send(staged, "ep0-ba20", 0)
    if isinstance(folder, LocalFolder):
        (staged / "__1_0.distcp").unlink()
    folder.commit(staged, "ep0-ba20")
    folder = open_folder(str(folder))  # by another process
    assert folder.names() == ["ep0-ba10"]
    folder.clear()
    assert any("ba20" in name for name in listing(folder)), "the part may still come"
    for rank in (0, 1):
        folder.begin(staged, "ep0-ba20", rank)
    (tmp_path / "again/staged").mkdir(parents=True)
    folder.send(stage(tmp_path / "again", "ep0-ba20"), "ep0-ba20", 1)
    assert folder.names() == ["ep0-ba10"], "new parts do not make an old copy whole"


def test_a_checkpoint_cut_short_in_a_copy_is_none(tmp_path):
    folder = LocalFolder(str(tmp_path))
    save(folder, tmp_path, "ep0-ba10-rank0.pt")
    (tmp_path / "ep0-ba20-rank0.pt").write_bytes((tmp_path / "ep0-ba10-rank0.pt").read_bytes()[:-100])
    os.mkfifo(tmp_path / "ep0-ba30-rank0.pt")
    assert folder.names() == ["ep0-ba10-rank0.pt"]


def test_a_checkpoint_with_a_damaged_end_is_there_and_damaged(tmp_path):
    folder = LocalFolder(str(tmp_path))
    save(folder, tmp_path, "ep0-ba10-rank0.pt")
    content = bytearray((tmp_path / "ep0-ba10-rank0.pt").read_bytes())
    content[content.rindex(b"PK\x06\x07") + 4] ^= 1  # as one of several disks
    (tmp_path / "ep0-ba10-rank0.pt").write_bytes(content)
    assert folder.names() == ["ep0-ba10-rank0.pt"]
    assert folder.is_damaged("ep0-ba10-rank0.pt", 0, 1)


def test_the_link_leads_to_the_newest_and_never_to_a_diverged_state(tmp_path):
    folder = LocalFolder(str(tmp_path))
    for name in ("ep0-ba10-rank0.pt", "ep0-ba20-rank0.pt"):
        save(folder, tmp_path, name)
    folder.commit(stage(tmp_path, "ep0-ba30-rank0.pt"), "diverged-ep0-ba30-rank0.pt")
    assert (tmp_path / LATEST).readlink() == Path("ep0-ba20-rank0.pt")
    assert folder.names()[-1] == "ep0-ba20-rank0.pt"


def test_a_checkpoint_is_saved_even_where_no_link_to_it_can_be_made(tmp_path, capsys):
    (tmp_path / LATEST).mkdir()
    folder = LocalFolder(str(tmp_path))
    save(folder, tmp_path, "ep0-ba10-rank0.pt")
    assert folder.names() == ["ep0-ba10-rank0.pt"]
    assert f"{tmp_path / LATEST} does not lead to ep0-ba10-rank0.pt (Is a directory)" in capsys.readouterr().err


@pytest.mark.parametrize("taken", ["link", "open to others", "theirs"])
def test_a_place_for_uploads_that_others_can_write_to_is_refused(store, tmp_path, monkeypatch, taken):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = open_folder("s3://bucket/run")
    private = folder.staging().parent
    assert private.stat().st_mode & 0o077 == 0
    assert folder.staging().parent == private, "at the next start, too"
    if taken == "link":
        private.rename(tmp_path / "elsewhere")
        private.symlink_to(tmp_path / "elsewhere")
    elif taken == "open to others":
        private.chmod(0o770)
    else:
        me = os.getuid()
        private.rename(str(private).replace(f"-{me}-", f"-{me + 1}-"))
        monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(UserError, match="is no folder that only you can write to"):
        folder.staging()


HOLDER = """
import os, sys, time
from esm2_composer.checkpoints.local import LocalFolder
LocalFolder(sys.argv[1]).lock()
if os.fork():
    print(flush=True)
time.sleep(30)
"""


def test_a_folder_in_use_is_waited_for_and_then_refused(tmp_path, monkeypatch, capsys):
    """By its owner, not by a worker that it has forked, and that outlives it."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, cwd=ROOT) as holder:
        (worker,) = holder.stdout.readline() and psutil.Process(holder.pid).children()
        in_use = f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()}; "
        monkeypatch.setattr(local, "LOCK_SECONDS", 0)
        with pytest.raises(TransientError, match=in_use):
            LocalFolder(str(tmp_path)).lock()
        monkeypatch.setattr(local, "LOCK_SECONDS", 10)
        threading.Timer(2, holder.kill).start()
        LocalFolder(str(tmp_path)).lock()
        assert worker.is_running()
        worker.kill()
    assert f"{in_use}waiting for its end, 10 s at most" in capsys.readouterr().err
    assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o666, "others of a group may go on with the run"


def test_a_file_system_without_locks_is_gone_on_with(tmp_path, monkeypatch):
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(local.fcntl, "lockf", none)
    LocalFolder(str(tmp_path)).lock()


def test_what_tells_whether_a_folder_is_shared_is_cleared(folder):
    folder.write(".seen-0f", "")
    folder.clear()
    assert not listing(folder)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_disk_that_is_full_or_fails_is_worth_another_start(tmp_path, monkeypatch, number):
    def fail(_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    folder = LocalFolder(str(tmp_path))
    with pytest.raises(TransientError, match=rf"cannot be written \({os.strerror(number)}\)"):
        ask(folder, lambda: folder.write("recipe.yaml", "a: 1"))
    assert not list(tmp_path.iterdir())


def test_small_files_are_read_back(folder):
    assert folder.read("a.json") is None
    folder.write("a.json", "ä")
    assert folder.read("a.json") == "ä"
