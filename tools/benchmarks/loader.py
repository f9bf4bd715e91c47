"""From local shards to balanced microbatches: real tokens per second of one core, and where its time goes; versus
transformers' tokenizer and DataCollatorForLanguageModeling on sequences already in memory; with more loader
processes; and how evenly a global batch is divided among many ranks, and in how many milliseconds.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.lengths import uniref_like_lengths

from esm2_composer.command import in_range

BATCH = 256
TIMED_BATCHES = 8  # for the parts of the time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clusters",
        type=in_range(int, TIMED_BATCHES * BATCH),
        default=20_000,
        help="clusters of three members to make and read",
    )
    parser.add_argument(
        "--rounds", type=in_range(int, 1), default=5, help="turns of each contender, a second or so each"
    )
    parser.add_argument(
        "--workers", type=in_range(int, 1), nargs="*", default=[1, 2], help="loader processes to try"
    )
    parser.add_argument(
        "--ranks", type=in_range(int, 1), nargs="*", default=[2, 8, 64, 128, 512], help="ranks to simulate"
    )
    parser.add_argument(
        "--global-batch", type=in_range(int, 1), default=2048, help="sequences shared out to the ranks"
    )
    parser.add_argument("--microbatch-tokens", type=in_range(int, 1024), default=16_384)
    parser.add_argument(
        "--hidden-size", type=in_range(int, 1), default=1280, help="of the model that computes (650M's)"
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        write_shards(shards, args.clusters)
        return {
            "clusters": args.clusters,
            **measure_core(shards, args.rounds),
            "workers": [
                measure_workers(shards, workers, args.rounds, args.microbatch_tokens, args.hidden_size)
                for workers in args.workers
            ],
            "ranks": [
                measure_ranks(ranks, args.global_batch, args.microbatch_tokens, args.hidden_size)
                for ranks in args.ranks
            ],
        }


def write_shards(folder: Path, clusters: int) -> None:
    from streaming import MDSWriter

    from esm2_composer.data.mds import COLUMNS

    print(f"writing {clusters:,} clusters", file=sys.stderr)
    residues = np.random.default_rng(0).choice(np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", np.uint8), 1 << 20).tobytes()
    lengths = (uniref_like_lengths(3 * clusters, seed=0) - 2).astype(np.int32).reshape(clusters, 3)
    with MDSWriter(out=str(folder), columns=COLUMNS, compression="zstd", hashes=["xxh64"]) as writer:
        for i, members in enumerate(lengths):
            start = i * 331 % (len(residues) - 4096)
            writer.write(
                {
                    "cluster_id": f"UniRef50_{i:08d}",
                    "lengths": members,
                    "residues": residues[start : start + int(members.sum())],
                }
            )


def open_loader(shards: Path, workers: int):
    """A loader on links to the shards: Streaming opens a folder only once in a process."""
    from esm2_composer.data.draw import ClusterDraw
    from esm2_composer.data.loaders import train_loader
    from esm2_composer.data.masking import MaskingRule

    links = Path(tempfile.mkdtemp(dir=shards.parent))
    for file in shards.iterdir():
        (links / file.name).hardlink_to(file)
    draw = ClusterDraw(seed=0, max_length=1024, min_length=1, masking=MaskingRule())
    return train_loader(draw, None, str(links), BATCH, workers)


def endless(loader) -> Iterator[Any]:
    return itertools.chain.from_iterable(itertools.repeat(loader))


def rate(batches: Iterator[Any], tokens: Callable[[Any], int], seconds: float = 1.0) -> float:
    """Tokens per second, over at least `seconds` seconds."""
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        count += tokens(next(batches))
    return count / elapsed


def measure_core(shards: Path, rounds: int) -> dict[str, Any]:
    """One process and transformers in turns, and the parts of its time."""
    import torch

    torch.set_num_threads(1)
    loader = open_loader(shards, 0)
    ours, theirs = endless(loader), transformers_batches(loader.dataset)
    next(ours), next(theirs)
    rates: dict[str, list[float]] = {"esm2_composer": [], "transformers": []}
    for turn in range(rounds):
        print(f"one core: round {turn + 1} of {rounds}", file=sys.stderr)
        rates["esm2_composer"].append(rate(ours, lambda batch: len(batch["tokens"])))
        rates["transformers"].append(rate(theirs, lambda batch: int(batch["attention_mask"].sum())))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "tokens_per_second": medians,
        "ratio": medians["esm2_composer"] / medians["transformers"],
        "microseconds_per_sequence": parts_of_time(loader.dataset, ours),
    }


def transformers_batches(dataset) -> Iterator[Any]:
    """Sequences as strings through EsmTokenizer and DataCollatorForLanguageModeling, 16 at a time."""
    from transformers import DataCollatorForLanguageModeling, EsmTokenizer

    from esm2_composer.alphabet import TOKENS

    with tempfile.NamedTemporaryFile("w", suffix=".txt") as vocabulary:
        vocabulary.write("\n".join(TOKENS))
        vocabulary.flush()
        tokenizer = EsmTokenizer(vocabulary.name)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    clusters = (dataset.get_item(i) for i in range(512))
    texts = [str(cluster["residues"][: cluster["lengths"][0]], "ascii") for cluster in clusters]
    for start in itertools.cycle(range(0, len(texts), 16)):
        yield collator([tokenizer(text, truncation=True, max_length=1024) for text in texts[start : start + 16]])


def parts_of_time(dataset, batches: Iterator[Any]) -> dict[str, float]:
    """Microseconds a sequence for each part, measured one by one on the same clusters."""
    count = TIMED_BATCHES

    def timed(work: Callable[[int], Any]) -> tuple[float, list[Any]]:
        start = time.perf_counter()
        results = [work(i) for i in range(count * BATCH)]
        return (time.perf_counter() - start) / (count * BATCH) * 1e6, results

    read, clusters = timed(dataset.get_item)
    drawn, samples = timed(lambda i: dataset.draw.window(clusters[i], 0))
    start = time.perf_counter()
    for first in range(0, len(samples), BATCH):
        dataset.draw.collate(samples[first : first + BATCH])
    masked = (time.perf_counter() - start) / len(samples) * 1e6
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    whole = (time.perf_counter() - start) / (count * BATCH) * 1e6
    return {
        "find and read a cluster": read,
        "draw member and window": drawn,
        "mask and collate": masked,
        "order (Streaming), DataLoader": max(0.0, whole - read - drawn - masked),
    }


def measure_workers(
    shards: Path, workers: int, rounds: int, microbatch_tokens: int, hidden_size: int
) -> dict[str, Any]:
    """How fast `workers` loader processes feed a model that does nothing, cutting into microbatches included."""
    from esm2_composer.data.pool import PooledLoader

    print(f"{workers} loader processes", file=sys.stderr)
    batches = endless(PooledLoader(open_loader(shards, workers), microbatch_tokens, hidden_size))
    for _ in range(2 * workers + 2):
        next(batches)
    rates = [rate(batches, lambda batch: batch["num_tokens"]) for _ in range(rounds)]
    return {"workers": workers, "tokens_per_second": statistics.median(rates)}


def measure_ranks(
    ranks: int, global_batch: int, microbatch_tokens: int, hidden_size: int, batches: int = 20
) -> dict[str, Any]:
    """The busiest rank's work over the mean: as sequences come, with equally many tokens, and balanced."""
    from esm2_composer.data.pool import balance, work_of

    ratios: dict[str, list[float]] = {"before": [], "equal_tokens": [], "balanced": []}
    seconds = []
    for seed in range(batches):
        lengths = uniref_like_lengths(global_batch, seed)
        work = work_of(lengths, hidden_size)
        start = time.perf_counter()
        balanced = balance(lengths, work, ranks, microbatch_tokens)
        seconds.append(time.perf_counter() - start)
        ways = {
            "before": np.array_split(np.arange(global_batch), ranks),
            "equal_tokens": balance(lengths, lengths, ranks, microbatch_tokens),
            "balanced": balanced,
        }
        for name, bins in ways.items():
            each = np.array([sum(work[bin_].sum() for bin_ in bins[rank::ranks]) for rank in range(ranks)])
            ratios[name].append(each.max() / each.mean())
    return {
        "ranks": ranks,
        "microbatches": len(balanced) // ranks,
        "slowest_over_mean_before": statistics.mean(ratios["before"]),
        "slowest_over_mean_with_equal_tokens": statistics.mean(ratios["equal_tokens"]),
        "slowest_over_mean": statistics.mean(ratios["balanced"]),
        "slowest_over_mean_at_worst": max(ratios["balanced"]),
        "milliseconds": statistics.median(seconds) * 1e3,
    }


def table(result: dict[str, Any]) -> str:
    lines = ["one core, real tokens a second:"]
    lines += [f"  {name:28} {each:12,.0f}" for name, each in result["tokens_per_second"].items()]
    lines += [f"  {'ratio':28} {result['ratio']:12,.0f}x", "microseconds a sequence:"]
    lines += [f"  {name:28} {each:12.1f}" for name, each in result["microseconds_per_sequence"].items()]
    lines += ["loader processes, real tokens a second in microbatches:"]
    lines += [f"  {each['workers']:<28} {each['tokens_per_second']:12,.0f}" for each in result["workers"]]
    lines += [
        "work of the busiest rank over the mean, 20 global batches:",
        f"  {'ranks':>5} {'microbatches':>12} {'before':>8} {'equal tokens':>12} {'balanced':>9} {'at worst':>8} "
        f"{'ms':>6}",
    ]
    lines += [
        f"  {each['ranks']:5} {each['microbatches']:12} {each['slowest_over_mean_before']:8.3f} "
        f"{each['slowest_over_mean_with_equal_tokens']:12.4f} {each['slowest_over_mean']:9.4f} "
        f"{each['slowest_over_mean_at_worst']:8.4f} {each['milliseconds']:6.2f}"
        for each in result["ranks"]
    ]
    return "\n".join(lines)
