"""Training steps (forward, backward, clip, AdamW) of one model on the same sequences of UniRef-like lengths, by
this project through Composer's Trainer and by transformers' EsmForMaskedLM in plain PyTorch, padded to 1,024 and
to the longest of a microbatch (a transformers without sdpa for ESM takes part as it is, and with sdpa patched in);
on a GPU transformers' compiled too, layer by layer, ours under FSDP as its recipe has it, in fp8, and compiled on
torch's attention, and flash-attn, faesm and esm-efficient, if installed: real tokens per second, the model's
operations as a fraction of the peak and of a matrix product measured in the same run (operations on real tokens
only, the same number for all), and peak memory.

Every contender runs in its own process, the contenders in turns, so that none profits from another's memory or
from a quiet moment of the machine. On a CPU peak memory is what the steps added to the process; on a GPU it is the
most that was allocated, including weights and optimizer. A contender that fails is a row that says why; the exit
code is 0 if this project ran.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from benchmarks.contenders import LONGEST, Failure, Outcome, Work, bins_of, contenders, recipe_of, run_contender
from benchmarks.devices import add_device_argument
from benchmarks.lengths import uniref_like_lengths
from benchmarks.limits import Limits, measure_limits

from esm2_composer.command import in_range
from esm2_composer.errors import UserError
from esm2_composer.model import SIZES
from esm2_composer.recipe.architecture import skeleton
from esm2_composer.recipe.estimate import estimate_run, fitting_microbatch
from esm2_composer.recipe.gpus import GPU

ON_CPU = 16 * LONGEST  # tokens of a microbatch: one of transformers' batches of 16
NAME = 58  # letters of a contender's name
ON_GPU = 64 * LONGEST  # beyond half of that, more hardly speed a GPU up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_work_arguments(parser)
    parser.add_argument("--rounds", type=in_range(int, 1), default=2, help="turns of every contender")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="contenders whose names have one of these")


def add_work_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="8m")
    add_device_argument(parser)
    parser.add_argument("--batches", type=in_range(int, 1), default=2, help="different batches, in turns")
    parser.add_argument(
        "--sequences", type=in_range(int, 1), help="a batch; by default 16 on a CPU, on a GPU a full microbatch"
    )
    parser.add_argument(
        "--microbatch-tokens",
        type=in_range(int, LONGEST),
        help="by default what `plan` finds room for, at most 65,536 or the recipe's, whichever is more",
    )
    parser.add_argument(
        "--steps", type=in_range(int, 1), help="that count, a round; by default 2 on a CPU, 20 on a GPU"
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run every contender in turns, `rounds` times, or until Ctrl-C, which ends with what was measured by then."""
    limits = [in_own_process(measure_limits, args.device)]
    work = make_work(args, limits[0])
    all_names = list(contenders(args.device, args.size))
    names = [n for n in all_names if not args.only or any(word in n for word in args.only)]
    if not names:
        raise UserError(f"--only {' '.join(args.only)}: there are {', '.join(all_names)}")
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
    failures: dict[str, Failure] = {}
    budgets = dict.fromkeys(names, work.microbatch_tokens)
    try:
        for turn in range(args.rounds):
            for name in [name for name in names if name not in failures]:
                print(f"round {turn + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
                found, budgets[name] = attempt_in_halves(name, work, budgets[name])
                if isinstance(found, Failure):
                    print(f"{name}: {found.reason}", file=sys.stderr, flush=True)
                    failures[name] = found
                else:
                    outcomes[name].append(found)
            limits.append(in_own_process(measure_limits, args.device))
    except KeyboardInterrupt:
        pending = [name for name in names if name not in failures and not outcomes[name]]
        failures |= dict.fromkeys(pending, Failure("interrupted"))
    return summary(work, limits, outcomes, budgets, failures)


def attempt_in_halves(name: str, work: Work, budget: int) -> tuple[Outcome | Failure, int]:
    """One contender's turn, halving the microbatch as long as memory does not suffice; and what did."""
    found = attempt(name, dataclasses.replace(work, microbatch_tokens=budget))
    while isinstance(found, Failure) and found.out_of_memory and budget >= 2 * LONGEST:
        print(found.reason, file=sys.stderr, flush=True)
        budget //= 2
        found = attempt(name, dataclasses.replace(work, microbatch_tokens=budget))
    return found, budget


def attempt(name: str, work: Work) -> Outcome | Failure:
    """One contender's turn. If it fails, the others' figures stand."""
    try:
        return in_own_process(run_contender, name, work)
    except BrokenProcessPool:
        return Failure("its process was killed, as happens when the host's memory is full")


def make_work(args: argparse.Namespace, limits: Limits) -> Work:
    on_gpu = args.device == "cuda"
    microbatch = args.microbatch_tokens or (_by_plan(args.size, limits) if on_gpu else ON_CPU)
    sequences = args.sequences or (None if on_gpu else 16)
    return Work(
        size=args.size,
        device=args.device,
        batches=[_batch(sequences, microbatch, seed) for seed in range(args.batches)],
        microbatch_tokens=microbatch,
        warmup=2 * args.batches if on_gpu else 1,
        steps=args.steps or (20 if on_gpu else 2),
    )


def _by_plan(size: str, limits: Limits) -> int:
    """The largest microbatch for which the whole training state leaves room on this GPU."""
    gpu = GPU(limits.peak_flops or limits.product_flops, limits.memory, 1, 1)  # a single one: it sends nothing
    recipe = recipe_of(size)
    fitting = fitting_microbatch(recipe, estimate_run(recipe, 1, gpu, mfu=0.4), gpu)
    if fitting < LONGEST:
        raise UserError(f"--size {size}: weights and optimizer leave no room on {limits.device}")
    return min(max(ON_GPU, recipe.device_microbatch_tokens), fitting)


def _batch(sequences: int | None, microbatch: int, seed: int) -> list[int]:
    """Tokens of each of so many sequences, or of as many as fill a microbatch."""
    if sequences is not None:
        return uniref_like_lengths(sequences, seed).tolist()
    lengths = uniref_like_lengths(microbatch // 30, seed)  # none has fewer tokens
    return lengths[lengths.cumsum() <= microbatch].tolist()


def in_own_process(function: Callable, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def summary(
    work: Work,
    limits: list[Limits],
    outcomes: dict[str, list[Outcome]],
    budgets: dict[str, int],
    failures: dict[str, Failure],
) -> dict[str, Any]:
    tokens = [sum(lengths) for lengths in work.batches]
    product = statistics.median(limit.product_flops for limit in limits)
    peak = limits[0].peak_flops
    rows = []
    for name, rounds in outcomes.items():
        failure = failures[name].reason if name in failures else None
        if not rounds:
            rows.append({"name": name, "real_tokens_per_second": None, "failure": failure})
            continue
        by_batch: dict[int, list[float]] = {}
        for found in rounds:
            for i, seconds in enumerate(found.seconds, start=work.warmup):
                by_batch.setdefault(i % len(work.batches), []).append(seconds)
        medians = {batch: statistics.median(seconds) for batch, seconds in by_batch.items()}
        spread = np.concatenate([np.array(by_batch[batch]) / median for batch, median in medians.items()])
        seconds = sum(medians.values())
        flops = sum(operations(work, batch) for batch in medians) / seconds
        rows.append(
            {
                "name": name,
                "attention": rounds[0].attention,
                "microbatch_tokens": budgets[name],
                "steps": sum(map(len, by_batch.values())),
                "seconds_per_step": seconds / len(medians),
                "spread": [float(q) - 1 for q in np.percentile(spread, [10, 90])],
                "real_tokens_per_second": sum(tokens[batch] for batch in medians) / seconds,
                "mfu": peak and flops / peak,
                "share_of_product": flops / product,
                "peak_mib": max(found.peak_bytes for found in rounds) / 2**20,
                "failure": failure,  # in a later round than the reported ones
            }
        )
    bins = [
        [lengths[i] for i in bin_]
        for lengths in work.batches
        for bin_ in bins_of(lengths, None, work.microbatch_tokens)
    ]
    return {
        "size": work.size,
        "device": limits[0].device,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "batches": len(work.batches),
        "sequences": [len(lengths) for lengths in work.batches],
        "real_tokens": tokens,
        "microbatch_tokens": work.microbatch_tokens,
        "fill_at_1024": sum(tokens) / sum(LONGEST * len(lengths) for lengths in work.batches),
        "fill_at_longest": sum(tokens) / sum(max(bin_) * len(bin_) for bin_ in bins),
        "peak_tflops": peak and peak / 1e12,
        "product_tflops": product / 1e12,
        "contenders": rows,
    }


def operations(work: Work, batch: int) -> int:
    """Floating-point operations of a training step on a batch; the head runs on 15 % of its tokens."""
    lengths = work.batches[batch]
    return skeleton(SIZES[work.size]).flops(lengths, round(0.15 * sum(lengths)))


def went_well(result: dict[str, Any]) -> bool:
    """Whether this project ran, if it was asked for; its peers need not."""
    ours = [row for row in result["contenders"] if row["name"].startswith("esm2_composer")]
    return not ours or ours[0]["failure"] is None


def table(result: dict[str, Any]) -> str:
    peak = f"peak {result['peak_tflops']:,.0f} TFLOP/s, " if result["peak_tflops"] else ""
    lines = [
        f"ESM-2 {result['size']} on {result['device']}, torch {result['torch']}, transformers "
        f"{result['transformers']}; {peak}a matrix product reaches {result['product_tflops']:,.2f} TFLOP/s",
        f"{result['batches']} batches of {', '.join(map(str, result['sequences']))} sequences, "
        f"{sum(result['real_tokens']):,} real tokens: {result['fill_at_1024']:.0%} of the slots at 1,024, "
        f"{result['fill_at_longest']:.0%} at the longest; {result['microbatch_tokens']:,} tokens a microbatch",
        f"{'':{NAME}} {'attention':17} {'s/step':>9} {'10 to 90 %':>12} {'real tok/s':>11} {'ours is':>8} "
        f"{'MFU':>6} {'of product':>10} {'peak MiB':>9}",
    ]
    lines += [_row(row, result) for row in result["contenders"]]
    return "\n".join(lines)


def _row(row: dict[str, Any], result: dict[str, Any]) -> str:
    speed, first = row["real_tokens_per_second"], result["contenders"][0]
    if speed is None:
        return f"{row['name']:{NAME}} failed: {row['failure']}"
    low, high = row["spread"]
    ours = first["real_tokens_per_second"] if first["name"] == "esm2_composer" else None
    ratio = f"{ours / speed:.2f}x" if ours else "-"
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
    smaller = row["microbatch_tokens"] != result["microbatch_tokens"]
    return (
        f"{row['name']:{NAME}} {row['attention']:17} {row['seconds_per_step']:9.3f} "
        f"{f'{low:+.0%} {high:+.0%}':>12} {speed:11,.0f} {ratio:>8} {mfu:>6} "
        f"{row['share_of_product']:10.1%} {row['peak_mib']:9,.0f}"
        + (f"  ({row['microbatch_tokens']:,} tokens a microbatch)" if smaller else "")
        + (f"  (then failed: {row['failure']})" if row["failure"] else "")
    )
