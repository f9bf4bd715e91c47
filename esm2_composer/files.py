"""Local files: atomic, durable, never written over another."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import xxhash

from esm2_composer.addresses import is_remote
from esm2_composer.errors import UserError, system_error


def write_durably(path: Path, content: bytes) -> None:
    """Write a file that is whole whenever it exists under its name."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # another machine may write it too
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def appearing_whole(out: Path) -> Iterator[Path]:
    """A path next to `out` for a file or a folder, which becomes `out` once it is written.

    Raises:
        UserError: it exists.
        UserError, TransientError: it cannot be written, see `system_error`.
    """
    partial = out.with_name(f".{out.name}.partial")
    lock = partial.with_name(f"{partial.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as held:
            if not try_lock(held):
                raise UserError(f"{out}: another command is writing it")
            try:
                if os.path.lexists(out) and not out.is_dir():  # another command's; renaming refuses a full folder
                    raise UserError(f"{out} exists already")
                _remove(partial)  # of a command that was killed
                yield partial
                partial.rename(out)
            finally:
                _remove(partial)
                _remove(lock)
    except OSError as error:
        raise system_error(f"{out}: cannot be written ({error.strerror or error})", error) from error


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def try_lock(file: int | IO) -> bool:
    """Whether nobody else has locked the file. This open file then has, until all processes that share it, a child
    that inherits it too, have closed it or ended.

    Raises OSError where the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sync(path: Path) -> None:
    """See that what was written to a file, or what a folder lists, outlasts a power failure."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def xxh64(path: Path) -> str:
    """The xxHash64 of a file of any size, in hexadecimal digits."""
    with path.open("rb") as file:
        digest = xxhash.xxh64()
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def refuse_existing(out: Path, kind: str = "file") -> None:
    """Raises UserError if there is something at `out`, which a rename would replace; a link to nowhere too.

    Also if it is the address of a store, which Path has shortened to s3:/bucket.
    """
    if is_remote(str(out)):
        raise UserError(f"{out}: write to a local disk, and copy")
    if os.path.lexists(out) or out.name == "..":
        raise UserError(f"{out} exists already; remove it, or choose another {kind}")


def refuse_irregular(path: Path) -> None:
    """Inputs are read more than once, and not only by us: refuse folders, and pipes, which would hang."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file")
