"""The host's time between two updates, when a GPU that is done has nothing to do: from the optimizer's return to
the model's next call, without loggers, with TensorBoard's and W&B's as runs have them, and with Composer's two;
each in its own process, in turns. Also how long a whole update takes, since runs' loggers write later, while a GPU
still computes. W&B writes to a folder that is deleted with the process.

Also what an answer of all ranks costs on this machine, for which a run would wait after each update if it did not
ask earlier: a number summed by gloo, by the number of ranks.

On a CPU the model's steps lie outside the time between two updates.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch
from benchmarks.contenders import Work, make_trainer
from benchmarks.devices import add_device_argument
from benchmarks.step import in_own_process

from esm2_composer.command import in_range
from esm2_composer.model import SIZES

WARMUP = 20  # updates
SEQUENCE = 320  # tokens of one, at most
LOGGERS = ("none", "esm2_composer's", "Composer's")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="8m", help="(%(default)s)")
    add_device_argument(parser, default="cpu")
    parser.add_argument("--tokens", type=in_range(int, 3), default=16, help="of an update (%(default)s)")
    parser.add_argument("--updates", type=in_range(int, 1), default=100, help="that count, a round (%(default)s)")
    parser.add_argument("--rounds", type=in_range(int, 1), default=2, help="(%(default)s)")
    parser.add_argument(
        "--ranks", type=in_range(int, 2), nargs="*", default=[2, 8, 32], help="that sum a number (2 8 32)"
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    sequences = -(-args.tokens // SEQUENCE)
    lengths = [len(part) for part in np.array_split(range(args.tokens), sequences)]
    work = Work(args.size, args.device, [lengths], args.tokens, warmup=WARMUP, steps=args.updates + 1)
    gaps: dict[str, list[float]] = {name: [] for name in LOGGERS}
    updates: dict[str, list[float]] = {name: [] for name in LOGGERS}
    for _ in range(args.rounds):
        for name in LOGGERS:
            found = in_own_process(time_updates, name, work)
            gaps[name] += found[0]
            updates[name] += found[1]
    medians = {name: statistics.median(each) for name, each in gaps.items()}
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "size": args.size,
        "tokens": args.tokens,
        "updates": args.updates * args.rounds,
        "by_loggers": [
            {
                "loggers": name,
                "seconds_between_updates": median,
                "spread": [float(q) / median - 1 for q in np.percentile(gaps[name], [10, 90])],
                "over_none": median / medians["none"],
                "seconds_per_update": statistics.median(updates[name]),
            }
            for name, median in medians.items()
        ],
        "sums": [{"ranks": ranks, "seconds": sum_of_ranks(ranks)} for ranks in args.ranks],
    }


def time_updates(loggers: str, work: Work) -> tuple[list[float], list[float]]:
    """Seconds between the optimizer's return and the model's next call, after each update that counts, and from
    the model's call in one update to that in the next."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": folder, "WANDB_SILENT": "true"}
        trainer = make_trainer(work, loggers=make_loggers(loggers, folder))
        (optimizer,) = trainer.state.optimizers
        ends, starts = [], []
        optimizer.register_step_post_hook(lambda *_: ends.append(time.perf_counter()))
        trainer.state.model.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
        trainer.fit()
        trainer.close()
    gaps = [start - end for end, start in zip(ends, starts[1:], strict=False)]
    updates = [after - before for before, after in itertools.pairwise(starts)]
    return gaps[work.warmup :], updates[work.warmup :]


def make_loggers(name: str, folder: str) -> list:
    from composer.loggers import TensorboardLogger, WandBLogger

    from esm2_composer.loggers import TensorBoard, WandB

    if name == "none":
        return []
    board, wandb = (TensorBoard, WandB) if name == "esm2_composer's" else (TensorboardLogger, WandBLogger)
    return [board(log_dir=folder, flush_interval=10), wandb(project="host")]


def sum_of_ranks(ranks: int) -> float:
    """Seconds until all of `ranks` processes have the sum of a number, the median of many."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_sum, (ranks, folder), ranks, start_method="fork")
        with open(f"{folder}/seconds") as file:
            return float(file.read())


def _sum(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=ranks)
    number, times = torch.tensor(0), []
    for _ in range(50):
        start = time.perf_counter()
        torch.distributed.all_reduce(number)
        times.append(time.perf_counter() - start)
    if not rank:
        with open(f"{folder}/seconds", "w") as file:
            file.write(str(statistics.median(times[10:])))
    torch.distributed.barrier()


def table(result: dict[str, Any]) -> str:
    lines = [
        f"ESM-2 {result['size']} on {result['device']}, torch {result['torch']}: "
        f"{result['updates']} updates of {result['tokens']:,} tokens with each",
        f"{'loggers':16} {'between updates, ms':>20} {'10 to 90 %':>12} {'of none':>8} {'an update, ms':>14}",
    ]
    for row in result["by_loggers"]:
        low, high = row["spread"]
        lines.append(
            f"{row['loggers']:16} {1000 * row['seconds_between_updates']:20.2f} {f'{low:+.0%} {high:+.0%}':>12} "
            f"{row['over_none']:7.2f}x {1000 * row['seconds_per_update']:14.2f}"
        )
    lines += [f"a number summed by {row['ranks']} ranks: {1000 * row['seconds']:.2f} ms" for row in result["sums"]]
    return "\n".join(lines)
