"""What a run's host does between two updates, when a GPU that is done has nothing to do: from the optimizer's
return to the model's next call, without loggers, with TensorBoard's and W&B's as runs have them, and with
Composer's two; each in its own process, in turns. W&B writes to a folder that goes with the process.

And what an answer of all ranks costs on this machine, for which a run would wait after each update, had it not
asked before: a number summed by gloo, by the number of ranks.

The model is the 8M one, on a CPU, where its steps lie outside the time that is measured. On a GPU the launch of
kernels and NCCL's sums come on top.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch
from benchmarks.contenders import Work, make_trainer
from benchmarks.step import in_own_process

from esm2_composer.errors import UserError

WARMUP = 20  # updates
LOGGERS = ("none", "esm2_composer's", "Composer's")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--updates", type=int, default=100, help="that count, a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 8, 32], help="that sum a number (2 8 32)")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    for name in ("updates", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if min(args.ranks, default=2) < 2:
        raise UserError("--ranks must be at least 2")
    seconds: dict[str, list[float]] = {name: [] for name in LOGGERS}
    for _ in range(args.rounds):
        for name in LOGGERS:
            seconds[name] += in_own_process(between_updates, name, args.updates)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "torch": torch.__version__,
        "updates": args.updates * args.rounds,
        "between_updates": [
            {
                "loggers": name,
                "seconds": median,
                "spread": [float(q) / median - 1 for q in np.percentile(seconds[name], [10, 90])],
                "over_none": median / medians["none"],
            }
            for name, median in medians.items()
        ],
        "sums": [{"ranks": ranks, "seconds": sum_of_ranks(ranks)} for ranks in args.ranks],
    }


def between_updates(loggers: str, updates: int) -> list[float]:
    """Seconds between the optimizer's return and the model's next call, after each of so many updates."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": folder, "WANDB_SILENT": "true"}
        work = Work("8m", "cpu", [[9, 7]], microbatch_tokens=1024, warmup=WARMUP, steps=updates + 1)
        trainer = make_trainer(work, loggers=make_loggers(loggers, folder))
        (optimizer,) = trainer.state.optimizers
        ends, starts = [], []
        optimizer.register_step_post_hook(lambda *_: ends.append(time.perf_counter()))
        trainer.state.model.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
        trainer.fit()
        trainer.close()
    return [start - end for end, start in zip(ends, starts[1:], strict=False)][WARMUP:]


def make_loggers(name: str, folder: str) -> list:
    from composer.loggers import TensorboardLogger, WandBLogger

    from esm2_composer.loggers import TensorBoard, WandB

    board, wandb = {
        "none": (None, None),
        "esm2_composer's": (TensorBoard, WandB),
        "Composer's": (TensorboardLogger, WandBLogger),
    }[name]
    return [board(log_dir=folder, flush_interval=10), wandb(project="host")] if board else []


def sum_of_ranks(ranks: int) -> float:
    """Seconds until all of so many processes have the sum of a number, the median of many."""
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
        f"the host between two updates, {result['updates']} of each kind, torch {result['torch']}",
        f"{'loggers of TensorBoard and W&B':34} {'ms':>8} {'10 to 90 %':>14} {'of none':>8}",
    ]
    for row in result["between_updates"]:
        low, high = row["spread"]
        lines.append(
            f"{row['loggers']:34} {1000 * row['seconds']:8.2f} {f'{low:+.0%} {high:+.0%}':>14} "
            f"{row['over_none']:7.2f}x"
        )
    lines += [f"a number summed by {row['ranks']} ranks: {1000 * row['seconds']:.2f} ms" for row in result["sums"]]
    return "\n".join(lines)
