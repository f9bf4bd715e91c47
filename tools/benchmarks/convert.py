"""Conversion of synthetic clusters in BioNeMo's layout: clusters a second, peak memory, bytes a residue.

Every measurement runs tools/convert.py as a user does, on input made for it: lengths as in UniRef50, 2.9 members
per cluster, sequences in the database in a different order than the clusters. The input was written just before,
so it is in the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from esm2_composer.command import in_range

UNIREF_RESIDUES = 63e9
CLUSTER_TAIL, MAX_CLUSTER = 1.3, 50  # P(size >= k) = k ** -1.3: mean 2.9
CONVERT = Path(__file__).parents[1] / "convert.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clusters", type=in_range(int, 1), nargs="+", default=[10_000, 100_000], help="sizes (%(default)s)"
    )
    parser.add_argument(
        "--workers", type=in_range(int, 1), nargs="+", default=[1, 2], help="processes (%(default)s)"
    )
    parser.add_argument(
        "--huge", type=in_range(int, 0), default=0, help="members of the first cluster, and time its draw"
    )


def measure(args: argparse.Namespace) -> dict:
    """Convert inputs of every size with every number of workers."""
    rows = []
    for clusters in args.clusters:
        with tempfile.TemporaryDirectory(prefix="convert-") as folder:
            print(f"making {clusters:,} clusters", file=sys.stderr, flush=True)
            make_input(Path(folder), clusters, args.huge)
            for workers in args.workers:
                rows.append(
                    {"clusters": clusters, "workers": workers, **convert(Path(folder), workers, args.huge)}
                )
                rate = rows[-1]["clusters_per_second"]
                print(f"{workers} workers: {rate:,.0f} clusters a second", file=sys.stderr, flush=True)
    return {"load_average": os.getloadavg()[0], "cpus": len(os.sched_getaffinity(0)), "rows": rows}


def make_input(folder: Path, clusters: int, huge: int) -> None:
    """clusters.parquet and proteins.db; the first cluster has at least `huge` members."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    generator = np.random.default_rng(clusters)
    sizes = np.minimum(generator.random(clusters) ** (-1 / CLUSTER_TAIL), MAX_CLUSTER).astype(int)
    sizes[0] = max(sizes[0], huge)
    members = int(sizes.sum())
    ids = generator.permutation(members)
    names = pa.array([f"UniRef90_A0A{number:09X}" for number in ids.tolist()])
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
    columns = {
        "ur50_id": [f"UniRef50_A0A{number:09X}" for number in range(clusters)],
        "ur90_id": pa.ListArray.from_arrays(offsets, names),
    }
    pq.write_table(pa.table(columns), folder / "clusters.parquet")
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
    with contextlib.closing(sqlite3.connect(folder / "proteins.db")) as database, database:
        database.execute("PRAGMA synchronous = OFF")
        database.execute("CREATE TABLE protein (id TEXT PRIMARY KEY, sequence TEXT)")
        for start in range(0, members, 50_000):
            numbers = range(start, min(start + 50_000, members))
            lengths = np.maximum(generator.lognormal(np.log(277.5), 0.63, len(numbers)).astype(int), 20)
            ends = np.cumsum(lengths).tolist()
            text = generator.choice(letters, ends[-1]).tobytes().decode()
            sequences = (text[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True))
            named = (f"UniRef90_A0A{number:09X}" for number in numbers)
            database.executemany("INSERT INTO protein VALUES (?, ?)", zip(named, sequences, strict=True))


def convert(folder: Path, workers: int, huge: int) -> dict:
    """Seconds, clusters a second, peak memory of the parent and of the largest worker, bytes a residue."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, CONVERT, "--clusters", folder / "clusters.parquet"]
        command += ["--sequences", folder / "proteins.db", "--out", out, "--workers", workers]
        start = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL)
        peaks = watch(process)
        elapsed = time.perf_counter() - start
        if process.returncode:
            raise RuntimeError(f"conversion ended with exit code {process.returncode}")
        conversion = json.loads((Path(out) / "train" / "conversion.json").read_text())
        shards = list((Path(out) / "train").glob("*.zstd"))
        size = sum(path.stat().st_size for path in shards)
        draws = time_draws(shards) if huge else {}
    rate = conversion["clusters_written"] / conversion["elapsed_seconds"]
    return {
        "members": conversion["members_written"],
        "residues": conversion["residues_written"],
        "seconds": elapsed,
        "clusters_per_second": rate,
        "cpu_seconds": peaks["cpu_seconds"],
        "clusters_per_cpu_second": conversion["clusters_written"] / peaks["cpu_seconds"],
        "uniref_hours": UNIREF_RESIDUES / (conversion["residues_written"] / conversion["elapsed_seconds"]) / 3600,
        "parent_mib": peaks["parent"] / 2**20,
        "worker_mib": peaks["worker"] / 2**20,
        "bytes_per_residue": size / conversion["residues_written"],
        **draws,
    }


def time_draws(shards: list[Path]) -> dict[str, float]:
    """CPU milliseconds to find, read and draw from a cluster: those of the median and of the largest one."""
    import zstd

    from esm2_composer.data.draw import ClusterDraw
    from esm2_composer.data.masking import MaskingRule
    from esm2_composer.data.mds import Shard

    draw = ClusterDraw(seed=0, max_length=1024, min_length=1, masking=MaskingRule())
    taken: list[tuple[int, float]] = []  # members, milliseconds
    for path in shards:
        shard = Shard(memoryview(zstd.decompress(path.read_bytes())), path)
        for number in range(len(shard)):
            start = time.thread_time()
            cluster = shard[number]
            draw.window(cluster, epoch=0)
            taken.append((len(cluster["lengths"]), 1000 * (time.thread_time() - start)))
    return {"draw_ms": statistics.median(ms for _, ms in taken), "draw_huge_ms": max(taken)[1]}


def watch(process: subprocess.Popen) -> dict[str, float]:
    """Wait for the end; peak resident memory (bytes) of it and of its largest child, and CPU seconds of all."""
    parent = psutil.Process(process.pid)
    peaks = {"parent": 0, "worker": 0}
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return {**peaks, "cpu_seconds": usage.ru_utime + usage.ru_stime}
        with contextlib.suppress(psutil.Error):  # one of them may have ended
            peaks["parent"] = max(peaks["parent"], parent.memory_info().rss)
            peaks["worker"] = max(peaks["worker"], *(child.memory_info().rss for child in parent.children()), 0)
        time.sleep(0.05)


def table(result: dict) -> str:
    lines = [
        f"{result['cpus']} cores, load average {result['load_average']:.1f} at the end",
        f"{'clusters':>10} {'workers':>8} {'members':>10} {'seconds':>8} {'clusters/s':>11} {'per CPU s':>10} "
        f"{'UniRef, h':>10} {'parent MiB':>11} {'worker MiB':>11} {'bytes/residue':>14}",
    ]
    lines += [
        f"{row['clusters']:10,} {row['workers']:8} {row['members']:10,} {row['seconds']:8.1f} "
        f"{row['clusters_per_second']:11,.0f} {row['clusters_per_cpu_second']:10,.0f} {row['uniref_hours']:10.1f} "
        f"{row['parent_mib']:11,.0f} {row['worker_mib']:11,.0f} {row['bytes_per_residue']:14.3f}"
        for row in result["rows"]
    ]
    lines += [
        f"a cluster takes {row['draw_ms']:.4f} ms to draw from, the huge one {row['draw_huge_ms']:.2f} ms"
        for row in result["rows"]
        if "draw_ms" in row
    ]
    return "\n".join(lines)
