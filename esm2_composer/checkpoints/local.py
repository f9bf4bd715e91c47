"""Checkpoints in a folder that all ranks see."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import time
import zipfile
from pathlib import Path

from esm2_composer.checkpoints import checksums
from esm2_composer.checkpoints.names import (
    DIVERGED,
    LATEST,
    PROBE,
    STAGING,
    is_checkpoint,
    is_diverged,
    listed_parts,
    updates,
)
from esm2_composer.distributed.collectives import say
from esm2_composer.errors import TransientError
from esm2_composer.files import sync, write_durably

LOCK = ".lock"
LOCK_SECONDS = 30  # enough for a run that got SIGTERM to leave (preemption.GRACE)


class LocalFolder:
    """What `S3Folder` offers too: see `folders` for what always holds."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if not os.access(self.path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def lock(self) -> None:
        """Keep other runs out until this process ends, where the file system has locks.

        fcntl's locks also work between nodes of a cluster, and loader workers, forked from here, do not inherit
        them.

        Raises:
            TransientError: another run uses it, and does not end; or its node died, and the file system has not
                noticed.
        """
        file = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)  # never closed, which would unlock it
        with contextlib.suppress(PermissionError):
            os.fchmod(file, 0o666)  # whoever can write to the folder may resume
        deadline = None
        while not _lock(file):
            holder = os.pread(file, 200, 0).decode(errors="replace") or "another run"
            message = f"save_folder {self} is in use by {holder}"
            if deadline is None:
                say(f"{message}; waiting for its end, {LOCK_SECONDS} s at most")
                deadline = time.monotonic() + LOCK_SECONDS
            if time.monotonic() > deadline:
                raise TransientError(
                    f"{message}; take another save_folder, or end it; if its node is dead, remove {LOCK} there"
                )
            time.sleep(1)
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def clear(self) -> None:
        """Clear what a killed run left unfinished."""
        shutil.rmtree(self.path / STAGING, ignore_errors=True)
        for path in self.path.glob(f"{PROBE}*"):
            path.unlink(missing_ok=True)
        for path in self.path.iterdir():
            if is_checkpoint(path.name) and path.is_dir() and not _is_whole(path):
                shutil.rmtree(path)

    def names(self) -> list[str]:
        """The whole checkpoints, oldest first."""
        found = [path.name for path in self.path.glob("ep*-ba*") if is_checkpoint(path.name) and _is_whole(path)]
        found.sort(key=updates)
        while found and _lacks_parts(self.path / found[-1]):  # only of the newest: it takes reading
            found.pop()
        return found

    def diverged(self) -> list[str]:
        """The states of runs that diverged."""
        return [path.name for path in self.path.glob(f"{DIVERGED}*") if is_diverged(path.name)]

    def location(self, name: str) -> str:
        return str(self.path / name)

    def staging(self) -> Path:
        """Where all ranks write a checkpoint before it is moved into place."""
        return self.path / STAGING

    def begin(self, staged: Path, name: str, rank: int) -> None:
        """Before any rank writes its part of a sharded checkpoint."""
        staged.mkdir(parents=True, exist_ok=True)

    def send(self, staged: Path, name: str, rank: int) -> None:
        """Put the rank's part of a sharded checkpoint in place: here, sync it to disk."""
        for path in staged.glob(f"__{rank}_*"):
            sync(path)

    def commit(self, staged: Path, name: str) -> None:
        """Make a checkpoint whole, once every rank has sent its part."""
        sync(staged / ".metadata" if staged.is_dir() else staged)
        if staged.is_dir():
            sync(staged)
        place = self.path / name
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(staged, place)
        sync(self.path)
        if is_checkpoint(name):
            self._link(name)

    def _link(self, name: str) -> None:
        link = self.path / f".{LATEST}.new"
        try:
            link.unlink(missing_ok=True)
            link.symlink_to(name)
            os.replace(link, self.path / LATEST)
        except OSError as error:  # some file systems have no links; no run needs this one
            with contextlib.suppress(OSError):
                link.unlink()
            say(f"{self.path / LATEST} does not lead to {name} ({error.strerror})")

    def remove(self, name: str) -> None:
        path = self.path / name
        if path.is_dir():
            (path / ".metadata").unlink(missing_ok=True)  # no longer whole, should we be killed in between
            shutil.rmtree(path)
        else:
            path.unlink()

    def read(self, name: str) -> str | None:
        try:
            return (self.path / name).read_text()
        except FileNotFoundError:
            return None

    def write(self, name: str, text: str) -> None:
        write_durably(self.path / name, text.encode())

    def is_damaged(self, name: str, rank: int, ranks: int) -> bool:
        """Whether this rank, of `ranks` that look, finds that a checkpoint is not what was written."""
        return checksums.is_damaged(self.path / name, rank, ranks)


def _lock(file: int) -> bool:
    """Whether no other process has it; also True where that cannot be determined."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the second on some systems
        return False
    except OSError:
        return True
    return True


def _is_whole(checkpoint: Path) -> bool:
    # Each format writes its table of contents last: this also detects a partial copy.
    if checkpoint.is_dir():
        return (checkpoint / ".metadata").exists()
    try:
        return checkpoint.is_file() and zipfile.is_zipfile(checkpoint)
    except zipfile.BadZipFile:  # whole but damaged, which is looked for later
        return True


def _lacks_parts(checkpoint: Path) -> bool:
    """Whether a sharded checkpoint lacks files that its `.metadata` lists, as after a partial copy."""
    if not checkpoint.is_dir():
        return False
    return not listed_parts((checkpoint / ".metadata").read_bytes()) <= set(os.listdir(checkpoint))
