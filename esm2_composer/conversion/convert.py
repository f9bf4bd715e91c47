"""A layout -> a split of MDS shards, in numbered parts, on disk or object storage.

What always holds: the shards depend only on input and options, not on who builds the parts or on how often the run
was killed; a part counts once its record exists, which is written after its shards, and they are whole; index.json
comes last, so that an unfinished split is never mistaken for a whole one.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from esm2_composer.addresses import is_remote
from esm2_composer.conversion.destinations import LocalSplit, RemoteSplit, open_destination
from esm2_composer.conversion.layouts import Layout
from esm2_composer.conversion.markers import read_marker, write_marker
from esm2_composer.conversion.parts import EngineError, Options, Part, PartBuilder, Processes
from esm2_composer.conversion.plan import Plan, make_plan
from esm2_composer.conversion.proteins import Counted
from esm2_composer.conversion.records import TOO_MANY_REJECTED, Report
from esm2_composer.conversion.work import (
    Interrupted,
    locked_work,
    refuse_differences,
    refuse_while_other_is_converted,
    remove_work,
    start_or_go_on,
    state_of,
    work_folder,
)
from esm2_composer.errors import ReadError, StoreUnavailable, UserError
from esm2_composer.files import sync, write_durably, xxh64
from esm2_composer.progress import OnProgress
from esm2_composer.storage import StoreError

UPLOADS = 8  # at a time

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
    work = work_folder(out, options.split, scratch)
    with locked_work(work, in_new_folder=not is_remote(out) and not work.parent.exists()):
        destination = open_destination(out, options.split, work)
        state = state_of(layout, options)
        finished = destination.conversion()
        if finished:
            refuse_differences(finished["state"], state, f"{out}: {options.split} exists already, of another")
            shutil.rmtree(work)
            return {**finished, "already_done": True}
        refuse_while_other_is_converted(work, options.split)
        other_split = destination.other_split()
        state["other_split"] = other_split and other_split.xxh64
        start_or_go_on(work, {**state, "destination": destination.address})
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
                remove_work(work)
            except Interrupted as stays:
                raise UserError(f"{error}; {stays}") from error
            if uploaded:
                raise UserError(f"{error}; shards stay at {out}/{options.split}, without index.json") from error
            raise
        remove_work(work)
    return conversion


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
