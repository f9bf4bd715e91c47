"""From launch to the first global batch of a split with as many clusters as UniRef50, and on resume in mid-epoch:
seconds, peak memory of a node's processes, and space in /dev/shm.

The index lists a thousand shards; their files are links to one, of very short proteins, already unpacked: so this
is the time that the order of an epoch takes, not that of the first download.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

from esm2_composer.command import in_range
from esm2_composer.errors import UserError

SHARD = 65_536  # clusters
SHARED_MEMORY = "/dev/shm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clusters", type=in_range(int, 1), default=65_182_365, help="of the split; UniRef50's by default"
    )
    parser.add_argument("--ranks", type=in_range(int, 1), default=1, help="of the node")
    parser.add_argument("--workers", type=in_range(int, 1), default=2, help="loader processes of each rank")
    parser.add_argument("--global-batch", type=in_range(int, 1), default=2048, help="sequences")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if args.clusters < args.global_batch:
        raise UserError(f"--clusters {args.clusters} do not fill one --global-batch of {args.global_batch}")
    half = args.clusters // args.global_batch // 2 * args.global_batch
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, done in (("from the start", 0), ("resumed in mid-epoch", half)):
            print(name, file=sys.stderr, flush=True)
            split = Path(folder, name.replace(" ", "_"))
            write_split(split, args.clusters)
            with ProcessPoolExecutor(args.ranks, multiprocessing.get_context("spawn")) as launch:  # of its own
                of_rank = partial(
                    first_batch,
                    ranks=args.ranks,
                    split=str(split),
                    global_batch=args.global_batch,
                    workers=args.workers,
                    done=done,
                )
                ranks = [launch.submit(of_rank, rank) for rank in range(args.ranks)]
                done_or_failed, _ = wait(ranks, return_when=FIRST_EXCEPTION)
                if failed := [rank for rank in done_or_failed if rank.exception()]:
                    for process in multiprocessing.active_children():  # others, which wait for it
                        process.kill()
                    failed[0].result()
                rows[name] = ranks[0].result()
    return {
        "clusters": args.clusters,
        "ranks": args.ranks,
        "workers": args.workers,
        "global_batch": args.global_batch,
        "load_average": os.getloadavg()[0],
        "launches": rows,
    }


def write_split(folder: Path, clusters: int) -> None:
    """An unpacked split of so many clusters, most of its shards the same file."""
    import numpy as np
    import zstd

    from esm2_composer.data.mds import ShardWriter

    folder.mkdir()
    entries = []
    for size in (SHARD, clusters % SHARD):
        if not size:
            continue
        writer = ShardWriter(folder, str(size))
        for i in range(size):
            writer.write({"cluster_id": str(i), "lengths": np.array([4], np.int32), "residues": b"MKTA"})
        (entry,) = writer.finish()
        packed = folder / entry["zip_data"]["basename"]
        (folder / entry["raw_data"]["basename"]).write_bytes(zstd.decompress(packed.read_bytes()))
        entries.append(entry)
    first, last = entries[0], entries[1:]
    shards = []
    for number in range(clusters // SHARD):
        shard = dict(first)
        for kind, name in (("raw_data", f"shard.{number:05}.mds"), ("zip_data", f"shard.{number:05}.mds.zstd")):
            (folder / name).hardlink_to(folder / first[kind]["basename"])
            shard[kind] = {**first[kind], "basename": name}
        shards.append(shard)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards + last}))


def first_batch(
    rank: int, ranks: int, split: str, global_batch: int, workers: int, done: int
) -> dict[str, float] | None:
    """Seconds until each rank has its first batch, with and without imports, and the peak memory meanwhile; rank 0
    reports it for all."""
    # A spawned process would spawn its own too, with separate imports; those of a training run are forked.
    multiprocessing.set_start_method("fork", force=True)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in place.items()})
    start = time.perf_counter()
    import torch.distributed as dist

    from esm2_composer.data.draw import ClusterDraw
    from esm2_composer.data.loaders import train_loader
    from esm2_composer.data.masking import MaskingRule

    dist.init_process_group("gloo", init_method=f"file://{split}.ranks", rank=rank, world_size=ranks)
    pids = [os.getpid()] * ranks
    dist.all_gather_object(pids, os.getpid())
    imported = time.perf_counter()
    _, imports = memory_of(pids)
    dist.barrier()
    with Peak(pids) if rank == 0 else contextlib.nullcontext() as peak:
        draw = ClusterDraw(seed=17, max_length=1024, min_length=1, masking=MaskingRule())
        loader = train_loader(draw, None, split, global_batch, workers)
        if done:
            state = loader.dataset.state_dict(done, from_beginning=True)
            dist.barrier()  # else a rank might find another's half-loaded state
            loader.dataset.load_state_dict({**state, "epoch": 0, "sample_in_epoch": done})
            dist.barrier()  # as a run's ranks do before they train
        batches = iter(loader)
        next(batches)
        dist.barrier()
        end = time.perf_counter()
    return peak and {
        "seconds": end - imported,
        "seconds_with_imports": end - start,
        "imports_mib": imports / 2**20,
        "largest_process_mib": peak.process / 2**20,
        "all_processes_mib": peak.processes / 2**20,
        "shared_memory_mib": peak.shared / 2**20,
    }


class Peak:
    """Peak memory, sampled every 20 ms: of the largest process, of ranks and loader processes together, and of
    what is new in /dev/shm."""

    process = processes = shared = 0

    def __init__(self, ranks: list[int]) -> None:
        self._ranks = ranks

    def __enter__(self) -> Peak:
        self._before = used_in(SHARED_MEMORY)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        ranks = [psutil.Process(rank) for rank in self._ranks]
        while not self._end.wait(0.02):
            try:
                children = [child.pid for rank in ranks for child in rank.children(recursive=True)]
                largest, together = memory_of([*self._ranks, *children])
            except (psutil.Error, OSError):  # one has just ended
                continue
            self.process = max(self.process, largest)
            self.processes = max(self.processes, together)
            self.shared = max(self.shared, used_in(SHARED_MEMORY) - self._before)


def memory_of(family: list[int]) -> tuple[int, int]:
    """Bytes of the largest process, and of all together, with shared pages counted once.

    Mapped files, mostly libraries, count as much as the process with most of them maps: their PSS would depend on
    which other processes on the machine use them.
    """
    status, maps = (
        [_sizes(f"/proc/{process}/{file}") for process in family] for file in ("status", "smaps_rollup")
    )
    own = sum(each["Pss_Anon"] + each["Pss_Shmem"] for each in maps)
    return max(each["VmRSS"] for each in status), own + max(each["RssFile"] for each in status)


def _sizes(path: str) -> dict[str, int]:
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {words[0][:-1]: 1024 * int(words[1]) for words in lines if words[-1] == "kB"}


def used_in(place: str) -> int:
    """Bytes in use of the file system at `place`."""
    usage = os.statvfs(place)
    return (usage.f_blocks - usage.f_bfree) * usage.f_frsize


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['clusters']:,} clusters, global batches of {result['global_batch']:,}, ranks: "
        f"{result['ranks']}, loader processes of each: {result['workers']}; load average "
        f"{result['load_average']:.1f} at the end",
        f"{'':22} {'first batch, s':>14} {'with imports':>12} {'imports, MiB':>12} {'largest process':>15} "
        f"{'all':>6} {'/dev/shm':>9}",
    ]
    lines += [
        f"{name:22} {row['seconds']:14.1f} {row['seconds_with_imports']:12.1f} "
        f"{row['imports_mib']:12,.0f} {row['largest_process_mib']:15,.0f} {row['all_processes_mib']:6,.0f} "
        f"{row['shared_memory_mib']:9,.0f}"
        for name, row in result["launches"].items()
    ]
    return "\n".join(lines)
