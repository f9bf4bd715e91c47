"""A layout -> a split of MDS shards, by many processes, in numbered parts, on disk or object storage.

What always holds: the shards follow from input and options alone, not from the number of workers or from how
often the run was killed; a part counts when its record is there, which is written after its shards; index.json
comes last, so that an unfinished split is never mistaken for a whole one.

Work in progress lies in a folder of its own, `.SPLIT.work`:

    lock          held by the one run that may write
    state.json    what this conversion is: inputs, options; a rerun with others is refused
    plan.*, staged.json, sequences.db, ids.parquet    see conversion_plan.py and layouts.py
    parts/        00000.json: shards and report of a finished part; 00000.ids: its clusters, in order
    shards/       the split to be: renamed at the end, or uploaded part by part
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from esm2_composer.conversion_plan import Plan, make_plan, read_part
from esm2_composer.errors import UserError
from esm2_composer.layouts import Layout, Sequences
from esm2_composer.mds import ShardWriter, write_durably
from esm2_composer.records import Report, build_record, choose_members
from esm2_composer.storage import Store, UploadError, is_remote

FORMAT = 1  # to be raised when the same input and options would give other shards
MEMBERS_AT_ONCE = 5_000
UPLOADS = 8  # at a time
MAX_CLUSTER_BYTES = 128 * 2**20
SPLITS = ("train", "valid")

# Told a stage ("sequences read", "clusters"), how much is done, and the total (0: not known).
Progress = Callable[[str, int, int], None]


class Interrupted(UserError):
    """Not the input's fault: the work is kept, and the same command goes on."""

    def __init__(self, cause: object) -> None:
        super().__init__(f"{cause}; the work is kept: run the same command again to go on")


@dataclass(frozen=True)
class Options:
    """What decides about the shards, beside the input."""

    split: str = "train"
    max_members_per_cluster: int | None = None
    seed: int = 0  # of the choice of members where there are more


def convert(
    layout: Layout,
    out: str,
    options: Options,
    max_reject_fraction: float = 0.01,
    workers: int = 1,
    scratch: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Write the split `OUT/options.split`, or finish writing it; if it is there already, leave it.

    Args:
        out: folder or URI that holds the splits.
        max_reject_fraction: the share of rejected members above which nothing is written.
        scratch: where work in progress for object storage lies; by default the current folder.

    Returns:
        The content of the split's conversion.json; "already_done" is added if nothing was left to do.

    Raises:
        UserError: a mistake in input or options; nothing stays behind.
        Interrupted: disk, memory or network failed; the work stays.
    """
    start = time.monotonic()
    if is_remote(out):
        name = "".join(letter if letter.isalnum() else "_" for letter in out.rstrip("/"))
        work = (scratch or Path()) / f".{name}.{options.split}.work"
    else:
        work = Path(out) / f".{options.split}.work"
    with _locked(work):
        destination = _Remote(out, options.split, work) if is_remote(out) else _Local(out, options.split, work)
        state = _describe(layout, options)
        finished = destination.conversion()
        if finished:
            _refuse_differences(finished["state"], state, f"{out}: {options.split} exists already, of another")
            shutil.rmtree(work)
            return {**finished, "already_done": True}
        other_split = destination.other_cluster_ids()
        state["other_split"] = other_split and xxhash.xxh64(other_split.read_bytes()).hexdigest()
        _start_or_go_on(work, state)
        try:
            plan = make_plan(layout, work, other_split, workers, partial(progress, "sequences read", total=0))
            arguments = (plan.path, plan.sequences, work, options, layout.rows_are_clusters)
            parts = partial(_build_parts, workers=workers, arguments=arguments)
            report = _convert_parts(plan, work, parts, destination, max_reject_fraction, progress)
            conversion = {
                "state": state,
                **report.as_dict(),
                "parts": plan.parts,
                "elapsed_seconds": round(time.monotonic() - start, 2),
            }
            _finish(work, plan.parts, conversion, destination)
        except Interrupted:
            raise
        except KeyboardInterrupt:
            raise Interrupted("stopped from the keyboard") from None
        except UserError:
            shutil.rmtree(work)
            raise
        except (OSError, sqlite3.OperationalError, duckdb.IOException, UploadError, BrokenProcessPool) as error:
            raise Interrupted(error) from error
        shutil.rmtree(work)
    return conversion


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Hold the work folder; the lock dies with the process. Leaves no folder in which nothing was begun."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise UserError(f"{work}: cannot be written ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{work}: another conversion is at work there; wait for it or stop it") from None
        try:
            yield
        finally:
            if work.exists() and not (work / "state.json").exists():
                shutil.rmtree(work)


def _describe(layout: Layout, options: Options) -> dict[str, Any]:
    """What the shards follow from, as far as can be told without reading it all."""
    inputs = {
        role: [
            {"path": str(path.absolute()), "bytes": path.stat().st_size, "modified": path.stat().st_mtime_ns}
            for path in paths
        ]
        for role, paths in layout.inputs.items()
    }
    return {"format": FORMAT, "inputs": inputs, "options": asdict(options)}


def _start_or_go_on(work: Path, state: dict[str, Any]) -> None:
    path = work / "state.json"
    if path.exists():
        _refuse_differences(json.loads(path.read_text()), state, f"{work} holds unfinished work, of another")
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
    if differences:
        shown = "; ".join(differences[:3])
        raise UserError(f"{what} conversion: {shown}; remove it, or choose another --out")


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, part in items for k, v in _flat(part, f"{key}.{name}" if key else name).items()}
    return {key: value}


class _Local:
    """A split on disk: it appears whole, by a rename."""

    def __init__(self, out: str, split: str, work: Path) -> None:
        self._out, self._split, self._work = Path(out), split, work

    def conversion(self) -> dict[str, Any] | None:
        """conversion.json of the finished split, if there is one."""
        split = self._out / self._split
        if not os.path.lexists(split):
            return None
        if not (split / "index.json").is_file() or not (split / "conversion.json").is_file():
            raise UserError(
                f"{split} exists already and is no finished conversion; remove it, or choose another --out"
            )
        return _read_conversion(split / "conversion.json")

    def other_cluster_ids(self) -> Path | None:
        (other,) = set(SPLITS) - {self._split}
        path = self._out / other / "cluster_ids.parquet"
        return path if path.exists() else None

    def publish(self, name: str) -> None:
        """The shard lies where it will be."""

    def finish(self) -> None:
        (self._work / "shards").rename(self._out / self._split)


class _Remote:
    """A split on object storage: its files are uploaded as they come, index.json last."""

    def __init__(self, out: str, split: str, work: Path) -> None:
        self._out, self._split, self._work = out.rstrip("/"), split, work
        self._store = Store(f"{self._out}/{split}", work / "shards")

    def conversion(self) -> dict[str, Any] | None:
        if not self._store.exists("index.json"):
            return None
        if not self._store.exists("conversion.json"):
            raise UserError(f"{self._out}/{self._split} exists already; remove it, or choose another --out")
        return _read_conversion(self._fetch(self._store, "conversion.json"))

    def other_cluster_ids(self) -> Path | None:
        (other,) = set(SPLITS) - {self._split}
        store = Store(f"{self._out}/{other}", self._work / "other")
        return self._fetch(store, "cluster_ids.parquet") if store.exists("cluster_ids.parquet") else None

    def _fetch(self, store: Store, name: str) -> Path:
        folder = self._work / "fetched"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return store.download(name, folder)

    def publish(self, name: str) -> None:
        self._store.upload(name)
        (self._work / "shards" / name).unlink()

    def finish(self) -> None:
        for name in ("cluster_ids.parquet", "conversion.json", "index.json"):
            self._store.upload(name)


def _read_conversion(path: Path) -> dict[str, Any]:
    try:
        conversion = json.loads(path.read_text())
        conversion["state"]["inputs"]
    except (ValueError, LookupError, TypeError):
        raise UserError(
            f"{path} is of another version of this program; remove it, or choose another --out"
        ) from None
    return conversion


@dataclass
class _Part:
    number: int
    shards: list[dict[str, Any]]  # entries of index.json
    report: Report


class _Builder:
    """Builds parts: rows of the plan -> sequences -> records -> shards. One in every worker."""

    def __init__(self, plan: Path, sequences: Path, work: Path, options: Options, rows_are_clusters: bool) -> None:
        self._plan, self._work, self._options = plan, work, options
        self._rows_are_clusters = rows_are_clusters
        self._sequences = Sequences(sequences)

    def build(self, number: int) -> _Part:
        report, written = Report(), []
        writer = ShardWriter(self._work / "shards", f"{number:05}")
        for clusters in self._batches(number, report):
            found = self._look_up(clusters)
            report.counts["sequences_found"] += sum(map(len, found.values()))
            for name, members in clusters:
                record = build_record(
                    name, [(member, found.get(member.encode(), ())) for member in members], report
                )
                if record is None:
                    continue
                if len(record["residues"]) > MAX_CLUSTER_BYTES:
                    raise _too_large(name)
                writer.write(record)
                written.append(name)
        shards = writer.finish()
        ids = pa.BufferOutputStream()
        pq.write_table(pa.table({"cluster_id": pa.array(written, pa.string())}), ids, compression="zstd")
        write_durably(self._work / "parts" / f"{number:05}.ids", ids.getvalue().to_pybytes())
        return _Part(number, shards, report)

    def _batches(self, number: int, report: Report) -> Iterator[list[tuple[str, list[str]]]]:
        """(id, members chosen) of a part's clusters, as many at a time as are worth a look-up."""
        batch: list[tuple[str, list[str]]] = []
        size = 0
        for name, named, shared, in_other_split, rows in read_part(self._plan, number):
            if rows > 1 and self._rows_are_clusters:
                report.change("cluster in several rows, joined", name)
            if in_other_split:
                report.counts.update(clusters_read=1, members_read=len(named))
                report.reject("cluster of the other split", name, len(named))
                continue
            limit, seed = self._options.max_members_per_cluster, self._options.seed
            members = choose_members(name, named, report, shared, limit, seed)
            if batch and size + len(members) > MEMBERS_AT_ONCE:
                yield batch
                batch, size = [], 0
            batch.append((name, members))
            size += len(members)
        yield batch

    def _look_up(self, clusters: list[tuple[str, list[str]]]) -> dict[bytes, list]:
        members = [member for _, members in clusters for member in members]
        if len(clusters) > 1:
            return self._sequences.look_up(members)
        found: dict[bytes, list] = {}
        size = 0
        for start in range(0, len(members), MEMBERS_AT_ONCE):  # a huge cluster must not fill the memory first
            some = self._sequences.look_up(members[start : start + MEMBERS_AT_ONCE])
            found.update(some)
            size += sum(
                len(sequence) for given in some.values() for sequence in given if isinstance(sequence, bytes)
            )
            if size > MAX_CLUSTER_BYTES:
                raise _too_large(clusters[0][0])
        return found


def _too_large(cluster_id: str) -> UserError:
    return UserError(
        f"cluster {cluster_id} has more than {MAX_CLUSTER_BYTES // 2**20} MiB of residues, "
        "too many for one sample; set --max-members-per-cluster"
    )


_builder: _Builder  # of a worker process


def _start_worker(*arguments: Any) -> None:
    global _builder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (wait_for_any([parent.sentinel]), os._exit(1)), daemon=True).start()
    _builder = _Builder(*arguments)


def _build_part(number: int) -> _Part:
    return _builder.build(number)


def _build_parts(numbers: list[int], workers: int, arguments: tuple[Any, ...]) -> Iterator[_Part]:
    """Build parts in `workers` processes; they come as they are done, and no faster than they are taken."""
    if min(workers, len(numbers)) <= 1:
        if numbers:
            yield from map(_Builder(*arguments).build, numbers)
        return
    context = multiprocessing.get_context("spawn")  # a fork would hold the lock, and copy the parent's memory
    pool = ProcessPoolExecutor(min(workers, len(numbers)), context, _start_worker, arguments)
    waiting = list(reversed(numbers))
    running: set[Future[_Part]] = set()
    try:
        while waiting or running:
            while waiting and len(running) < 2 * workers:
                running.add(pool.submit(_build_part, waiting.pop()))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _convert_parts(
    plan: Plan,
    work: Path,
    build: Callable[[list[int]], Iterator[_Part]],
    destination: _Local | _Remote,
    max_reject_fraction: float,
    progress: Progress,
) -> Report:
    """Build and publish every part that is not there yet; the report on all of them.

    Raises UserError as soon as too much is rejected, whatever is still to come.
    """
    records = [work / "parts" / f"{number:05}.json" for number in range(plan.parts)]
    so_far = Report()
    so_far.merge(plan.report)
    for path in filter(Path.exists, records):
        so_far.merge(_read_record(path)[1])
    missing = [number for number, path in enumerate(records) if not path.exists()]
    progress("clusters", so_far.counts["clusters_read"], plan.clusters)

    def publish(part: _Part) -> Report:
        for shard in part.shards:
            destination.publish(shard["zip_data"]["basename"])
        record = {"shards": part.shards, "report": part.report.as_dict()}
        write_durably(records[part.number], json.dumps(record).encode())
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
            f"more than {max_reject_fraction:.1%}: {_summary(so_far)}"
        )
    if not so_far.counts["clusters_written"]:
        raise UserError(f"no cluster to write: {_summary(so_far) or 'the input is empty'}")
    return _merged(plan.report, records)


def _summary(report: Report) -> str:
    reasons = sorted(report.rejected.items(), key=lambda item: -item[1]["count"])
    return ", ".join(f"{reason} {told['count']:,} (such as {told['examples'][0]!r})" for reason, told in reasons)


def _merged(planned: Report, records: list[Path]) -> Report:
    """All reports, in the order of the parts."""
    report = Report()
    report.merge(planned)
    for path in records:
        report.merge(_read_record(path)[1])
    return report


def _read_record(path: Path) -> tuple[list[dict[str, Any]], Report]:
    record = json.loads(path.read_text())
    return record["shards"], Report.from_dict(record["report"])


def _finish(work: Path, parts: int, conversion: dict[str, Any], destination: _Local | _Remote) -> None:
    """Join what the parts left, and let the split appear."""
    shards = []
    schema = pa.schema({"cluster_id": pa.string()})
    with pq.ParquetWriter(work / "shards" / "cluster_ids.parquet", schema, compression="zstd") as ids:
        for number in range(parts):
            shards += _read_record(work / "parts" / f"{number:05}.json")[0]
            ids.write_table(pq.read_table(work / "parts" / f"{number:05}.ids"))
    write_durably(work / "shards" / "conversion.json", f"{json.dumps(conversion, indent=2)}\n".encode())
    index = {"version": 2, "shards": shards}
    write_durably(work / "shards" / "index.json", json.dumps(index, sort_keys=True).encode())
    destination.finish()
