"""Where checkpoints are: a folder that all nodes see, or an S3 store.

A checkpoint exists whole or not at all. It is written elsewhere and then moved into place; in a store the part
that completes it, the file itself or a sharded one's `.metadata`, comes last. So the newest one listed is the one
to resume from, whenever the run was killed, and no pointer to it is needed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import socket
import stat
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from esm2_composer.checkpoints import checksums
from esm2_composer.checkpoints.names import DIVERGED, LATEST, is_checkpoint, is_diverged, updates
from esm2_composer.distributed.collectives import say
from esm2_composer.errors import StoreUnavailable, TransientError, UserError, system_error
from esm2_composer.files import sync, write_durably
from esm2_composer.retry import Result, retry

LOCK = ".lock"
_STAGING, PROBE = ".saving", ".seen-"
DELETIONS = 10  # of a store's objects, at a time
LOCK_SECONDS = 30  # enough for a run that got SIGTERM to leave (preemption.GRACE)


class LocalFolder:
    """Checkpoints in a folder that all ranks see."""

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
        shutil.rmtree(self.path / _STAGING, ignore_errors=True)
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
        return self.path / _STAGING

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
    return not _parts((checkpoint / ".metadata").read_bytes()) <= set(os.listdir(checkpoint))


def _parts(metadata: bytes) -> set[str]:
    """The files that a `.metadata` lists: a pickle, not to be loaded."""
    return {name.decode() for name in re.findall(rb"__\d+_\d+\.distcp", metadata)}


class S3Folder:
    """Checkpoints in a store that speaks S3; `S3_ENDPOINT_URL` selects one other than Amazon's."""

    def __init__(self, uri: str) -> None:
        self._uri = uri.rstrip("/")
        self._bucket, _, prefix = self._uri.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._committed: str | None = None  # the last, by this process: it need not be looked at
        self._client = boto3.client(
            "s3",
            endpoint_url=os.environ.get("S3_ENDPOINT_URL"),
            config=Config(retries={"mode": "standard", "max_attempts": 5}),
        )

    def __str__(self) -> str:
        return self._uri

    def make(self) -> None:
        """Folders of a store need not be made."""

    def lock(self) -> None:
        """A store has no locks."""

    def clear(self) -> None:
        """Clear what a killed run left unfinished."""
        for key in self._keys(PROBE):
            self._delete(key)
        keys = self._keys("ep")
        whole = {key.removesuffix("/.metadata") for key in keys}
        for name in sorted({key.split("/")[0] for key in keys} - whole):
            if is_checkpoint(name):
                self.remove(name)

    def names(self) -> list[str]:
        """The whole checkpoints, oldest first."""
        keys = self._keys("ep")
        found = sorted(filter(is_checkpoint, (key.removesuffix("/.metadata") for key in keys)), key=updates)
        while found and found[-1] != self._committed and self._lacks_parts(found[-1], keys):
            found.pop()  # as in a local folder
        return found

    def _lacks_parts(self, name: str, keys: Sequence[str]) -> bool:
        if f"{name}/.metadata" not in keys:
            return False
        metadata = self._client.get_object(Bucket=self._bucket, Key=f"{self._prefix}{name}/.metadata")
        return not {f"{name}/{part}" for part in _parts(metadata["Body"].read())} <= set(keys)

    def diverged(self) -> list[str]:
        """The states of runs that diverged."""
        return sorted(filter(is_diverged, {key.split("/")[0] for key in self._keys(DIVERGED)}))

    def location(self, name: str) -> str:
        return f"{self._uri}/{name}"

    def staging(self) -> Path:
        """Where this node's ranks write a checkpoint before it is uploaded: the same at every start, so that what
        a killed run left there is cleared.

        Raises:
            UserError: others can write there, and could change what the next start unpickles.
        """
        mine = hashlib.sha256(self._uri.encode()).hexdigest()[:16]
        private = Path(tempfile.gettempdir(), f"checkpoints-{os.getuid()}-{mine}")
        with contextlib.suppress(FileExistsError):
            private.mkdir(0o700)
        found = private.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise UserError(
                f"{private} is no folder that only you can write to; remove it, or set TMPDIR to another"
            )
        return private / _STAGING

    def begin(self, staged: Path, name: str, rank: int) -> None:
        """Before any rank writes its part of a sharded checkpoint."""
        staged.mkdir(parents=True, exist_ok=True)
        if not rank:
            self.remove(name)  # what a copy cut short has left would make these parts look whole too early

    def send(self, staged: Path, name: str, rank: int) -> None:
        """Upload the rank's part of a sharded checkpoint."""
        for path in sorted(staged.glob(f"__{rank}_*")):
            self._upload(path, f"{name}/{path.name}")

    def commit(self, staged: Path, name: str) -> None:
        """Make a checkpoint whole, once every rank has sent its part."""
        if staged.is_dir():
            self._upload(staged / ".metadata", f"{name}/.metadata")
        else:
            self._upload(staged, name)
        self._committed = name

    def remove(self, name: str) -> None:
        keys = [key for key in self._keys(name) if key == name or key.startswith(f"{name}/")]
        keys.sort(key=lambda key: not key.endswith("/.metadata"))  # first what completes it
        with ThreadPoolExecutor(DELETIONS) as threads:
            for at_a_time in (keys[:1], keys[1:]):
                list(threads.map(self._delete, at_a_time))

    def read(self, name: str) -> str | None:
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)
        except self._client.exceptions.NoSuchKey:
            return None
        return answer["Body"].read().decode()

    def write(self, name: str, text: str) -> None:
        self._client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=text.encode())

    def is_damaged(self, name: str, rank: int, ranks: int) -> bool:
        """A store returns what was sent."""
        return False

    def _delete(self, key: str) -> None:
        self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)

    def _upload(self, path: Path, key: str) -> None:
        self._client.upload_file(str(path), self._bucket, self._prefix + key)

    def _keys(self, start: str) -> list[str]:
        """The objects whose names begin so, without the folder's own prefix."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + start
        )
        return [entry["Key"].removeprefix(self._prefix) for page in pages for entry in page.get("Contents", ())]


Folder = LocalFolder | S3Folder


def open_folder(uri: str) -> Folder:
    """Raises UserError if the store's endpoint or profile is invalid."""
    try:
        return S3Folder(uri) if uri.startswith("s3://") else LocalFolder(uri)
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"save_folder {uri}: {error}") from error


def damaged(folder: Folder, name: str, remedy: str) -> UserError:
    """For a file of a folder whose content is not what was written."""
    return UserError(f"save_folder {folder}: {name} is damaged; {remedy}")


def ask(folder: Folder, action: Callable[[], Result]) -> Result:
    """What `action` returns; waits for a store that does not answer.

    Raises:
        UserError: the folder cannot be used.
        TransientError: worth another start: the store is unreachable, or the disk is full or fails.
    """
    try:
        return retry(action, str(folder)) if isinstance(folder, S3Folder) else action()
    except StoreUnavailable:
        raise
    except OSError as error:
        raise system_error(f"save_folder {folder} cannot be written ({error.strerror})", error) from error
    except (BotoCoreError, ClientError) as error:
        raise UserError(f"save_folder {folder} cannot be read and written ({error})") from error
