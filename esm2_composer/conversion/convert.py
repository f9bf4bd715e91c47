"""A layout -> a split of MDS shards, in numbered parts, on disk or object storage.

What always holds: the shards depend only on input and options, not on who builds the parts or on how often the run
was killed; a part counts once its record exists, which is written after its shards, and they are whole; index.json
comes last, so that an unfinished split is never mistaken for a whole one.

Work in progress is in a separate folder, `.SPLIT.work` (for a store `.URI.SPLIT.work` in `--scratch`); the one run
that may write there holds `.SPLIT.work.lock` next to it:

    state.json    what this conversion is: inputs, options; a rerun with others is refused
    plan.*, staged.json, sequences.db, ids.parquet, clusters.tsv    see plan, layouts and proteins
    parts/        00000.json: shards and report of a finished part; 00000.ids: its clusters, in order
                  (plan.json, staged.json and these are `markers`)
    shards/       the split to be: renamed at the end, or uploaded part by part
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from esm2_composer.conversion.destinations import LocalSplit, RemoteSplit, open_destination, other_split_name
from esm2_composer.conversion.layouts import Layout
from esm2_composer.conversion.markers import read_marker, write_marker
from esm2_composer.conversion.parts import EngineError, Options, Part, PartBuilder, Processes
from esm2_composer.conversion.plan import Plan, make_plan
from esm2_composer.conversion.proteins import Counted
from esm2_composer.conversion.records import TOO_MANY_REJECTED, Report
from esm2_composer.data.splits import SPLITS
from esm2_composer.errors import ReadError, StoreUnavailable, TransientError, UserError, system_error
from esm2_composer.files import is_remote, sync, write_durably, xxh64
from esm2_composer.progress import OnProgress
from esm2_composer.storage import StoreError

FORMAT = 1  # to be incremented when the same input and options would give other shards
UPLOADS = 8  # at a time
SECONDS_TO_STOP = 10  # for workers that nobody waits for, such as Spark's

# Errors for which neither the input nor the options are to blame.
TRANSIENT = (ReadError, OSError, MemoryError, sqlite3.OperationalError, duckdb.IOException)
TRANSIENT += (duckdb.OutOfMemoryException, StoreError, StoreUnavailable, EngineError)


class Engine(Protocol):
    """What builds parts: `parts.Processes` of this machine, or `spark.Spark`."""

    def stage(self, layout: Layout, work: Path, progress: Counted) -> Report:
        """Make the sequences ready for `build`; reports what was found on the way."""

    def build(self, numbers: Sequence[int], builder: PartBuilder) -> Iterator[Part]:
        """The parts of these numbers, in any order. Raises EngineError where the input is not to blame."""


KEPT = "the work is kept: run the same command again to go on"


class Interrupted(TransientError):
    """The work is kept, and the same command resumes it."""


def convert(
    layout: Layout,
    out: str,
    options: Options,
    max_reject_fraction: float = 0.01,
    workers: int = 1,
    scratch: Path | None = None,
    progress: OnProgress = lambda stage, done, total: None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Write the split `OUT/options.split`, or finish writing it; if it is there already, leave it.

    Args:
        out: folder or URI that holds the splits.
        max_reject_fraction: the fraction of rejected members, or of clusters that name none, above which nothing
            is written.
        workers: threads that plan, and processes that build parts unless `engine` is given.
        scratch: where work in progress for object storage is kept; by default the current folder.

    Returns:
        The content of the split's conversion.json; "already_done" is added if nothing was left to do.

    Raises:
        UserError: a mistake in input or options; nothing is left behind but shards in object storage, and what was
            already there from another conversion.
        Interrupted: disk, memory or network failed; the work stays, as it does after a KeyboardInterrupt.
    """
    start = time.monotonic()
    engine = engine or Processes(workers)
    if is_remote(out):
        name = "".join(letter if letter.isalnum() else "_" for letter in out.rstrip("/"))
        work = (scratch or Path()) / f".{name}.{options.split}.work"
    else:
        work = Path(out) / f".{options.split}.work"
    with _locked(work, in_new_folder=not is_remote(out) and not work.parent.exists()):
        destination = open_destination(out, options.split, work)
        state = _describe(layout, options)
        finished = destination.conversion()
        if finished:
            _refuse_differences(finished["state"], state, f"{out}: {options.split} exists already, of another")
            shutil.rmtree(work)
            return {**finished, "already_done": True}
        _refuse_while_other_is_converted(work, options.split)
        other_split = destination.other_split()
        state["other_split"] = other_split and other_split.xxh64
        _start_or_go_on(work, {**state, "destination": destination.address})
        try:
            staged = engine.stage(layout, work, partial(progress, "sequences read", total=0))
            plan = make_plan(layout, work, other_split, workers, staged)
            if plan.rows_without_members > max_reject_fraction * plan.rows:
                raise UserError(
                    f"{plan.rows_without_members / plan.rows:.1%} of {plan.rows:,} clusters name no member, "
                    f"more than {max_reject_fraction:.1%}; {TOO_MANY_REJECTED}"
                )
            builder = PartBuilder(plan.path.absolute(), work.absolute(), options, layout.rows_are_clusters)
            build = partial(engine.build, builder=builder)
            _convert_parts(plan, work, build, destination, max_reject_fraction, progress)
            conversion = _join(work, plan, state, start)
            other_now = destination.other_split()
            if (other_now and other_now.xxh64) != state["other_split"]:
                raise UserError(
                    f"{out}: the other split has changed since {options.split} was compared with it, and the two "
                    "must share no cluster; run the same command again"
                )
            destination.finish()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(KEPT) from None
        except TRANSIENT as error:
            raise Interrupted(f"{error}; {KEPT}") from error
        except UserError as error:
            uploaded = is_remote(out) and any((work / "parts").glob("*.json"))
            try:
                _remove(work)
            except Interrupted as stays:
                raise UserError(f"{error}; {stays}") from error
            if uploaded:
                raise UserError(f"{error}; shards stay at {out}/{options.split}, without index.json") from error
            raise
        _remove(work)
    return conversion


def _remove(work: Path) -> None:
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
def _locked(work: Path, in_new_folder: bool = False) -> Iterator[None]:
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
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                raise BlockingIOError
            _remove_unknown(work)
            work.mkdir(exist_ok=True)
        except (BlockingIOError, FileNotFoundError):  # or the holder just ended and removed this file
            raise UserError(f"{work}: another conversion is at work there; wait for it or stop it") from None
        except OSError as error:
            path.unlink(missing_ok=True)
            raise system_error(f"{work}: cannot be made and locked ({error.strerror})", error) from error
        try:
            yield
        finally:
            _remove_unknown(work)
            if not work.exists():
                path.unlink(missing_ok=True)
            if in_new_folder:
                with contextlib.suppress(OSError):  # it is not empty
                    path.parent.rmdir()


def _refuse_while_other_is_converted(work: Path, split: str) -> None:
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
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _lock_of(work: Path) -> Path:
    return work.with_name(f"{work.name}.lock")


def _remove_unknown(work: Path) -> None:
    """Remove a work folder that does not say what it belongs to."""
    if work.exists() and not (work / "state.json").exists():
        shutil.rmtree(work)


def _describe(layout: Layout, options: Options) -> dict[str, Any]:
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


def _start_or_go_on(work: Path, state: dict[str, Any]) -> None:
    path = work / "state.json"
    if path.exists():
        try:
            begun = json.loads(path.read_text())
        except (ValueError, RecursionError):
            raise UserError(f"{path}: damaged; remove {work}, and the same command starts anew") from None
        _refuse_differences(begun, state, f"{work} holds unfinished work, of another")
    for folder in ("parts", "shards"):
        (work / folder).mkdir(exist_ok=True)
    write_durably(path, json.dumps(state, indent=2).encode())


def _refuse_differences(old: dict[str, Any], new: dict[str, Any], what: str) -> None:
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


def _convert_parts(
    plan: Plan,
    work: Path,
    build: Callable[[list[int]], Iterator[Part]],
    destination: LocalSplit | RemoteSplit,
    max_reject_fraction: float,
    progress: OnProgress,
) -> None:
    """Build and publish every part that is not there yet.

    Raises UserError as soon as too much is certain to be rejected.
    """
    records = [work / "parts" / f"{number:05}.json" for number in range(plan.parts)]
    so_far = Report()
    so_far.merge(plan.report)
    missing = []
    for number, path in enumerate(records):
        record = read_marker(path)
        if record and all(map(destination.has, record["shards"])):
            so_far.merge(Report.from_dict(record["report"]))
            progress("parts of before", number + 1, plan.parts)  # reading them, as they may be many
        else:
            missing.append(number)  # also what was damaged since, or uploaded and is gone
    progress("clusters", so_far.counts["clusters_read"], plan.clusters)

    def publish(part: Part) -> Report:
        for shard in part.shards:
            destination.publish(shard["zip_data"]["basename"])
        path = records[part.number]
        record = {"shards": part.shards, "report": part.report.as_dict()}
        write_marker(path, record, path.with_suffix(".ids"))
        return part.report

    with ThreadPoolExecutor(UPLOADS) as uploads, contextlib.closing(build(missing)) as parts:
        running: set[Future[Report]] = set()
        for part in parts:
            running.add(uploads.submit(publish, part))
            done, running = wait(running, None if len(running) >= UPLOADS else 0, FIRST_COMPLETED)
            for future in done:
                so_far.merge(future.result())
            if so_far.counts["members_rejected"] > max_reject_fraction * plan.members:
                break
            progress("clusters", so_far.counts["clusters_read"], plan.clusters)
        for future in running:
            so_far.merge(future.result())
        progress("clusters", so_far.counts["clusters_read"], plan.clusters)
    if so_far.counts["members_rejected"] > max_reject_fraction * plan.members:
        raise UserError(
            f"{so_far.counts['members_rejected'] / plan.members:.1%} of {plan.members:,} members rejected, "
            f"more than {max_reject_fraction:.1%}: {so_far.reasons()}; {TOO_MANY_REJECTED}"
        )
    if not so_far.counts["clusters_written"]:
        raise UserError(f"no cluster to write: {so_far.reasons() or 'the input is empty'}")


def _join(work: Path, plan: Plan, state: dict[str, Any], start: float) -> dict[str, Any]:
    """Join what the parts left, in their order, to make the shards a split; returns what conversion.json holds."""
    for aside in (work / "shards").glob(".*"):  # of a writer that was killed
        aside.unlink(missing_ok=True)  # or of one on another machine that has just ended
    shards, report = [], Report()
    report.merge(plan.report)
    schema = pa.schema({"cluster_id": pa.string()})
    with pq.ParquetWriter(work / "shards" / "cluster_ids.parquet", schema, compression="zstd") as ids:
        for number in range(plan.parts):
            path = work / "parts" / f"{number:05}.json"
            record = read_marker(path)
            if not record:
                raise ReadError(f"{path} or its .ids has been damaged meanwhile")
            shards += record["shards"]
            report.merge(Report.from_dict(record["report"]))
            ids.write_table(pq.read_table(path.with_suffix(".ids")))
    sync(work / "shards" / "cluster_ids.parquet")
    conversion = {
        "state": state,
        **report.as_dict(),
        "cluster_ids_xxh64": xxh64(work / "shards" / "cluster_ids.parquet"),
        "parts": plan.parts,
        "elapsed_seconds": round(time.monotonic() - start, 2),
    }
    write_durably(work / "shards" / "conversion.json", f"{json.dumps(conversion, indent=2)}\n".encode())
    index = {"version": 2, "shards": shards}
    write_durably(work / "shards" / "index.json", json.dumps(index, sort_keys=True).encode())
    return conversion
