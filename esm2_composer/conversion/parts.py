"""One part of the plan -> its shards, and many parts in many processes.

Whoever builds a part, and wherever its sequences come from, the shards are the same: they depend on the part's
rows of the plan, the sequences under the ids there, and the options.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from esm2_composer.conversion.layouts import Layout, stage
from esm2_composer.conversion.plan import read_part
from esm2_composer.conversion.proteins import Counted, Sequences
from esm2_composer.conversion.records import Member, Report, build_record, choose_members
from esm2_composer.data.mds import ShardWriter
from esm2_composer.errors import UserError
from esm2_composer.files import write_durably
from esm2_composer.workers import Workers

MEMBERS_AT_ONCE = 1_000  # their lengths are not known in advance; 5,000 are no faster
MAX_CLUSTER_BYTES = 128 * 2**20

# Ids -> every sequence under each of them that there is.
LookUp = Callable[[Sequence[str]], dict[bytes, list]]


class EngineError(Exception):
    """What builds parts failed, processes or machines; the input is not to blame."""


@dataclass(frozen=True)
class Options:
    """What determines the shards, besides the input."""

    split: str = "train"
    max_members_per_cluster: int | None = None
    seed: int = 0  # of the choice of members where there are more


@dataclass
class Part:
    """What was made of a part."""

    number: int
    shards: list[dict[str, Any]]  # entries of index.json
    report: Report


@dataclass(frozen=True)
class PartBuilder:
    """Builds parts: rows of the plan -> sequences -> records -> shards. Any process can have a copy."""

    plan: Path
    work: Path  # the conversion's folder, with shards/ and parts/
    options: Options
    rows_are_clusters: bool

    def build(self, number: int, look_up: LookUp) -> Part:
        """Write the shards of a part, and its clusters' ids, which are the same however often it is built.

        Raises UserError if a cluster is too large for a sample.
        """
        report, written = Report(), []
        writer = ShardWriter(self.work / "shards", f"{number:05}")
        for batch in self._batches(number, report):
            members = _with_sequences(batch, look_up, report)
            for name, chosen in batch:
                record = build_record(name, islice(members, len(chosen)), report)
                if record is None:
                    continue
                if len(record["residues"]) > MAX_CLUSTER_BYTES:
                    raise _too_large(name)
                writer.write(record)
                written.append(name)
        shards = writer.finish()
        ids = pa.BufferOutputStream()
        pq.write_table(pa.table({"cluster_id": pa.array(written, pa.string())}), ids, compression="zstd")
        write_durably(self.work / "parts" / f"{number:05}.ids", ids.getvalue().to_pybytes())
        return Part(number, shards, report)

    def clusters(self, number: int, report: Report) -> Iterator[tuple[str, list[str]]]:
        """(id, members whose sequences are wanted) of a part's clusters."""
        limit, seed = self.options.max_members_per_cluster, self.options.seed
        for name, named, shared, in_other_split, rows in read_part(self.plan, number):
            if rows > 1 and self.rows_are_clusters:
                report.change("cluster in several rows, joined", name)
            if in_other_split:
                report.counts.update(clusters_read=1, members_read=len(named))
                report.reject("cluster of the other split", name, len(named))
                continue
            if not named:
                report.counts.update(clusters_read=1)
                report.reject("cluster without members", name, 0)
                continue
            yield name, choose_members(name, named, report, shared, limit, seed)

    def _batches(self, number: int, report: Report) -> Iterator[list[tuple[str, list[str]]]]:
        """Clusters, as many at a time as make a look-up worthwhile."""
        batch: list[tuple[str, list[str]]] = []
        size = 0
        for name, members in self.clusters(number, report):
            if batch and size + len(members) > MEMBERS_AT_ONCE:
                yield batch
                batch, size = [], 0
            batch.append((name, members))
            size += len(members)
        yield batch


def _with_sequences(batch: list[tuple[str, list[str]]], look_up: LookUp, report: Report) -> Iterator[Member]:
    """The members of all clusters of a batch; of a huge one a few at a time, or they would fill the memory."""
    members = [member for _, chosen in batch for member in chosen]
    size = 0
    for start in range(0, len(members), MEMBERS_AT_ONCE):
        some = members[start : start + MEMBERS_AT_ONCE]
        found = look_up(some)
        report.counts["sequences_found"] += sum(map(len, found.values()))
        size += sum(len(text) for given in found.values() for text in given if isinstance(text, bytes))
        if size > MAX_CLUSTER_BYTES:
            _refuse_giants(found)
            if len(batch) == 1:
                raise _too_large(batch[0][0])
        for member in some:
            yield member, found.get(member.encode(), ())


def _refuse_giants(found: dict[bytes, list]) -> None:
    for member, given in found.items():
        if any(isinstance(text, bytes) and len(text) > MAX_CLUSTER_BYTES for text in given):
            raise UserError(
                f"member {member.decode()} has more than {MAX_CLUSTER_BYTES // 2**20} MiB of residues, "
                "which no protein has; take it out of the input"
            )


def _too_large(cluster_id: str) -> UserError:
    return UserError(
        f"cluster {cluster_id} has more than {MAX_CLUSTER_BYTES // 2**20} MiB of residues, "
        "too many for one sample; set --max-members-per-cluster"
    )


class Processes:
    """Builds parts in processes of this machine, which look sequences up in an SQLite file."""

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def stage(self, layout: Layout, work: Path, progress: Counted) -> Report:
        """Make the sequences ready to be looked up."""
        self._sequences, report = stage(layout, work, progress)
        return report

    def build(self, numbers: Sequence[int], builder: PartBuilder) -> Iterator[Part]:
        """Parts as they complete, and no faster than they are consumed."""
        workers = min(self._workers, len(numbers))
        if workers == 1:
            with contextlib.closing(Sequences(self._sequences)) as sequences:
                yield from (builder.build(number, sequences.look_up) for number in numbers)
        elif workers:
            pool = Workers(workers, _start_worker, builder, self._sequences)
            try:
                yield from as_done(pool, _build_part, numbers, 2 * workers, pool.stop)
            except BrokenProcessPool as error:
                raise EngineError(error) from error


def as_done(
    pool: Executor,
    build: Callable[[int], Part],
    numbers: Sequence[int],
    at_once: int,
    stop: Callable[[], None],
) -> Iterator[Part]:
    """Yield `build(n)` for each number as it completes, at most `at_once` in flight. At the end `stop` ends what
    still runs, and the pool is shut down."""
    waiting = list(reversed(numbers))
    running: set[Future[Part]] = set()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.add(pool.submit(build, waiting.pop()))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        stop()
        pool.shutdown(cancel_futures=True)


_builder: PartBuilder  # of a worker process
_sequences: Sequences


def _start_worker(builder: PartBuilder, sequences: Path) -> None:
    global _builder, _sequences
    _builder, _sequences = builder, Sequences(sequences)


def _build_part(number: int) -> Part:
    return _builder.build(number, _sequences.look_up)
