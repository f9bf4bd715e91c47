"""The work folder of a conversion: one process at a time, and only the conversion that was begun there.

It is `.SPLIT.work` next to the split to be, or for a store `.URI.SPLIT.work` in `--scratch`. The lock of the one
that may write there is `.SPLIT.work.lock`, next to it. In it are:

    state.json    what this conversion is: inputs, options; a rerun with others is refused
    plan.*, staged.json, sequences.db, ids.parquet, clusters.tsv    see plan, layouts and proteins
    parts/        00000.json: shards and report of a finished part; 00000.ids: its clusters, in order
                  (plan.json, staged.json and these are `markers`)
    shards/       the split to be: renamed at the end, or uploaded part by part
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import IO, Any

from esm2_composer.addresses import is_remote
from esm2_composer.conversion.destinations import other_split_name
from esm2_composer.conversion.layouts import Layout
from esm2_composer.conversion.parts import Options
from esm2_composer.data.splits import SPLITS
from esm2_composer.errors import TransientError, UserError, system_error
from esm2_composer.files import try_lock, write_durably

FORMAT = 1  # to be incremented when the same input and options would give other shards
SECONDS_TO_STOP = 10  # for workers that nobody waits for, such as Spark's


class Interrupted(TransientError):
    """The work is kept, and the same command resumes it."""


def work_folder(out: str, split: str, scratch: Path | None) -> Path:
    """Of the conversion to `out/split`."""
    if not is_remote(out):
        return Path(out) / f".{split}.work"
    name = "".join(letter if letter.isalnum() else "_" for letter in out.rstrip("/"))
    return (scratch or Path()) / f".{name}.{split}.work"


def remove_work(work: Path) -> None:
    """Remove the work folder, to which a worker that was told to stop, maybe on another machine, may still write.

    Raises Interrupted if that cannot be done.
    """
    deadline = time.monotonic() + SECONDS_TO_STOP
    while work.exists():
        try:
            shutil.rmtree(work)
        except OSError as error:
            if time.monotonic() > deadline:
                raise Interrupted(f"{work} cannot be removed ({error})") from error
            time.sleep(0.1)


@contextlib.contextmanager
def locked_work(work: Path, in_new_folder: bool = False) -> Iterator[None]:
    """Hold the work folder; the lock dies with the process. On exit, removes a work folder in which nothing was
    begun and, if `in_new_folder`, its parent when empty.

    The lock is next to the folder, and is removed after it: on NFS a folder with an open file cannot be removed.
    """
    path = _lock_of(work)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except FileExistsError:
        raise UserError(f"{path.parent} is a file; it must be a folder") from None
    except OSError as error:
        raise system_error(f"{path}: cannot be written ({error.strerror})", error) from error
    with lock:
        try:
            mine = try_lock(lock) and _is_open_at(path, lock)
            if mine:
                _remove_unknown(work)
                work.mkdir(exist_ok=True)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise system_error(f"{work}: cannot be made and locked ({error.strerror})", error) from error
        if not mine:
            raise UserError(f"{work}: another conversion is at work there; wait for it or stop it")
        try:
            yield
        finally:
            _remove_unknown(work)
            if not work.exists():
                path.unlink(missing_ok=True)
            if in_new_folder:
                with contextlib.suppress(OSError):  # it is not empty
                    path.parent.rmdir()


def refuse_while_other_is_converted(work: Path, split: str) -> None:
    """Raise a UserError now, not after hours of work that were compared with an incomplete split."""
    other = other_split_name(split)
    other_work = work.with_name(f"{work.name.removesuffix(f'{split}.work')}{other}.work")
    attempts = 10 if split == SPLITS[0] else 1  # of two that start at once, the first split's continues
    for _ in range(attempts):
        if not _is_locked(other_work):
            return
        time.sleep(0.1)
    raise UserError(
        f"{other_work}: {other} is being converted there; splits are converted one after the other, since the "
        "second is compared with the first"
    )


def _is_locked(work: Path) -> bool:
    """Whether a conversion is at work there; False where that cannot be determined."""
    with contextlib.suppress(FileNotFoundError, PermissionError), _lock_of(work).open("r+") as lock:
        return not try_lock(lock)
    return False


def _is_open_at(path: Path, file: IO) -> bool:
    """False if whoever held it has just ended, and removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock_of(work: Path) -> Path:
    return work.with_name(f"{work.name}.lock")


def _remove_unknown(work: Path) -> None:
    """Remove a work folder that does not say what it belongs to."""
    if work.exists() and not (work / "state.json").exists():
        shutil.rmtree(work)


def state_of(layout: Layout, options: Options) -> dict[str, Any]:
    """What the shards depend on, as far as is known without reading it all."""
    inputs = {
        role: [
            {"path": str(path.absolute()), "bytes": path.stat().st_size, "modified": path.stat().st_mtime_ns}
            for path in chain.from_iterable(map(_with_log, paths))
        ]
        for role, paths in layout.inputs.items()
    }
    return {"format": FORMAT, "inputs": inputs, "options": asdict(options)}


def _with_log(path: Path) -> list[Path]:
    """The file, and SQLite's files next to it with what is not yet in it."""
    log = path.with_name(f"{path.name}-wal")
    return [path, log] if log.exists() and log.stat().st_size else [path]


def start_or_go_on(work: Path, state: dict[str, Any]) -> None:
    """Note what this conversion is. Raises UserError if another was begun there."""
    path = work / "state.json"
    if path.exists():
        try:
            begun = json.loads(path.read_text())
        except (ValueError, RecursionError):
            raise UserError(f"{path}: damaged; remove {work}, and the same command starts anew") from None
        refuse_differences(begun, state, f"{work} holds unfinished work, of another")
    for folder in ("parts", "shards"):
        (work / folder).mkdir(exist_ok=True)
    write_durably(path, json.dumps(state, indent=2).encode())


def refuse_differences(old: dict[str, Any], new: dict[str, Any], what: str) -> None:
    """Raises UserError that begins with `what` if one conversion is not the other, as far as `new` tells."""
    before, now = _flat(old), _flat(new)
    differences = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key.split(".")[0] in new
    ]
    layouts = [sorted({key.split(".")[1] for key in flat if key.startswith("inputs.")}) for flat in (before, now)]
    if all(layouts) and layouts[0] != layouts[1]:
        differences = [f"inputs were {', '.join(layouts[0])}, are {', '.join(layouts[1])}"]
    if differences:
        shown = "; ".join(differences[:3])
        raise UserError(f"{what} conversion: {shown}; remove it, or choose another --out")


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, part in items for k, v in _flat(part, f"{key}.{name}" if key else name).items()}
    return {key: value}
