"""Building parts on Apache Spark, for a conversion too large for one machine.

The driver plans as it does for its own processes: that takes only ids, and keeps every rule about ids in one
place. The heavy work goes to the executors: each reads slices of the sequences in storage order, a shuffle brings
every sequence to the part that wants it, and the same PartBuilder makes the shards. So they are those of a single
machine, byte for byte.

Streaming's own `dataframe_to_mds` gives each task attempt a folder, so that a retried task leaves clusters twice;
here a part has one name, a shard appears whole under it, and any attempt writes the same. It also has no parts,
and so could not resume after a kill.

Every node must see the inputs and the work folder (in `--out`, or in `--scratch` for object storage) under the
same paths, and have this package with its Python. Uploads are the driver's.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from esm2_composer.conversion.layouts import Flat, Layout, open_parquet, read_flat, stage
from esm2_composer.conversion.parts import EngineError, Part, PartBuilder, as_done
from esm2_composer.conversion.proteins import Counted, protein_rows, read_proteins
from esm2_composer.conversion.records import Report
from esm2_composer.errors import UserError

ROWS_A_SLICE = 100_000
PARTS_AT_ONCE = 256  # waiting for Spark, each in a thread of the driver

# Arguments of `read_proteins` (a path, rows) or of `read_flat` (a path, a row group).
Slice = tuple[Path, int, int] | tuple[Path, int]


class Spark:
    """Builds parts on the cluster at `master`. Use as a context manager, at whose end it stops."""

    def __init__(self, master: str) -> None:
        """Raises UserError if there is no pyspark, no Java or no such cluster."""
        try:
            from py4j.protocol import Py4JError
            from pyspark import SparkConf, SparkContext
        except ImportError:
            raise UserError("--spark needs pyspark: pip install 'pyspark>=3.5,<4'") from None
        java = Path(os.environ["JAVA_HOME"], "bin", "java") if "JAVA_HOME" in os.environ else "java"
        if not shutil.which(java):
            raise UserError(f"--spark needs Java 17, and there is no {java} (apt install openjdk-17-jre-headless)")
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        self._failure = Py4JError
        conf = SparkConf().setMaster(master).setAppName("esm2_composer conversion")
        try:
            self._context = SparkContext(conf=conf.set("spark.ui.showConsoleProgress", "false"))
        except Exception as error:  # Java's own come in several types
            raise UserError(
                f"--spark {master}: cannot be started ({_first_line(error)}); see its output above"
            ) from error

    def __enter__(self) -> Spark:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(self._failure, OSError):  # Java may have died
            self._context.stop()

    def _cancel(self) -> None:
        with contextlib.suppress(self._failure, OSError):
            self._context.cancelAllJobs()

    def stage(self, layout: Layout, work: Path, progress: Counted) -> Report:
        """Find the slices. Flat parquet is read in place; for FASTA an SQLite file is made first, here."""
        if isinstance(layout, Flat):
            files = [(path.absolute(), open_parquet(path).metadata) for path in layout.inputs["flat"]]
            self._slices = [(path, group) for path, metadata in files for group in range(metadata.num_row_groups)]
            return Report(Counter(sequences_read=sum(metadata.num_rows for _, metadata in files)))
        path, report = stage(layout, work, progress)
        first, last = protein_rows(path)
        self._slices = [
            (path.absolute(), start, min(start + ROWS_A_SLICE - 1, last))
            for start in range(first, last + 1, ROWS_A_SLICE)
        ]
        return report

    def build(self, numbers: Sequence[int], builder: PartBuilder) -> Iterator[Part]:
        """Parts as they complete."""
        if not numbers:
            return
        count = len(numbers)
        wanted = self._context.parallelize(list(enumerate(numbers)), count).flatMap(partial(_wanted, builder))
        given = self._context.parallelize(self._slices, max(len(self._slices), 1)).flatMap(_read)
        by_place = wanted.join(given, count).map(_by_place).partitionBy(count, int)
        built = by_place.mapPartitionsWithIndex(partial(_build, builder, numbers))
        pool = ThreadPoolExecutor(min(count, PARTS_AT_ONCE))
        try:
            # One job per part, so that each is reported when done; they share what was shuffled.
            yield from as_done(
                pool,
                lambda place: self._context.runJob(built, list, [place])[0],
                range(count),
                PARTS_AT_ONCE,
                stop=self._cancel,
            )
        except self._failure as error:
            raise _cause(error) from error


def _wanted(builder: PartBuilder, part: tuple[int, int]) -> Iterator[tuple[bytes, int]]:
    """(id, the part's place among those to be built) of the sequences that a part wants."""
    place, number = part
    for _, members in builder.clusters(number, Report()):
        for member in members:
            yield member.encode(), place


def _read(where: Slice) -> Iterator[tuple[bytes | None, Any]]:
    """(id, sequence) of a slice, as `Sequences` gives them."""
    if len(where) == 3:
        yield from read_proteins(*where)
    else:
        for name, sequence in read_flat(*where):
            yield name and name.encode(), sequence if sequence is None else sequence.encode()


def _by_place(row: tuple[bytes, tuple[int, Any]]) -> tuple[int, tuple[bytes, Any]]:
    """A sequence with its id, keyed by the place of the part that wants it."""
    member, (place, sequence) = row
    return place, (member, sequence)


def _build(
    builder: PartBuilder, numbers: Sequence[int], place: int, rows: Iterable[tuple[int, tuple[bytes, Any]]]
) -> Iterator[Part]:
    found: dict[bytes, list] = {}
    for _, (member, sequence) in rows:
        found.setdefault(member, []).append(sequence)

    def look_up(ids: Sequence[str]) -> dict[bytes, list]:
        return {member: found[member] for member in map(str.encode, ids) if member in found}

    yield builder.build(numbers[place], look_up)


def _cause(error: Exception) -> Exception:
    """What an executor raised: it arrives as text, with Python's traceback and Java's."""
    text = str(error)
    mistake = re.search(rf"^{UserError.__module__}\.UserError: (.*)$", text, re.MULTILINE)
    if mistake:
        return UserError(mistake[1])
    raised = re.findall(r"^(?:[\w.]+(?:Error|Exception|Interrupt)\b.*)$", text, re.MULTILINE)
    return EngineError(f"Spark failed ({raised[-1] if raised else _first_line(error)})")


def _first_line(error: Exception) -> str:
    """Of the message, without the stack traces that may follow."""
    return next((line for line in str(error).splitlines() if line.strip() and not line.endswith(":")), repr(error))
