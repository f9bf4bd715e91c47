"""Measure this project beside its peers in one run: python tools/benchmark.py step [--json]

step    a training step (forward, backward, clip, AdamW) of one model on the same sequences, by this project
        and by transformers' EsmForMaskedLM, padded to 1,024 and to the longest: real tokens a second, and
        peak memory beyond the model's start

Every contender runs in a process of its own, the contenders in turns, so that none profits from another's
memory or from a quiet moment of the machine. Compare ratios: absolute figures change from machine to machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable

from esm2_composer.errors import UserError, run_command

STEP_CONTENDERS = ("esm2_composer", "transformers, padded to 1024", "transformers, padded to longest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="a training step beside transformers")
    step.add_argument("--size", default="8m", help="8m, 35m, 150m, 650m, 3b or 15b")
    step.add_argument("--sequences", type=int, default=16, help="sequences a step, of UniRef-like lengths")
    step.add_argument("--steps", type=int, default=5, help="timed steps a round")
    step.add_argument("--rounds", type=int, default=3, help="turns of every contender")
    step.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args()

    from esm2_composer.model import SIZES

    if args.size not in SIZES:
        raise UserError(f"--size {args.size}; there are: {', '.join(SIZES)}")
    if min(args.sequences, args.steps, args.rounds) < 1:
        raise UserError("--sequences, --steps and --rounds must be at least 1")
    result = measure_steps(args.size, uniref_like_lengths(args.sequences), args.steps, args.rounds)
    print_steps(result)
    if args.json:
        print(json.dumps(result))


def uniref_like_lengths(count: int, seed: int = 0) -> list[int]:
    """Tokens of `count` sequences: log-normal around UniRef50's median of 278 residues, its 2 % above 1,022
    cropped to 1,024 tokens."""
    import numpy as np

    residues = np.random.default_rng(seed).lognormal(np.log(277.5), 0.63, count)
    return np.clip(residues.astype(int) + 2, 30, 1024).tolist()


def measure_steps(size: str, lengths: list[int], steps: int, rounds: int) -> dict:
    """Run every contender `rounds` times, in turns."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in STEP_CONTENDERS}
    memory: dict[str, list[int]] = {name: [] for name in STEP_CONTENDERS}
    context = multiprocessing.get_context("spawn")
    for turn in range(rounds):
        for name in STEP_CONTENDERS:
            print(f"round {turn + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            with context.Pool(1) as pool:  # a new process each time
                times, peak = pool.apply(run_steps, (name, size, lengths, steps))
            seconds[name] += times
            memory[name].append(peak)
    tokens = sum(lengths)
    ours = statistics.median(seconds[STEP_CONTENDERS[0]])
    return {
        "size": size,
        "sequences": len(lengths),
        "real_tokens": tokens,
        "longest": max(lengths),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "contenders": [
            {
                "name": name,
                "seconds_per_step": statistics.median(seconds[name]),
                "real_tokens_per_second": tokens / statistics.median(seconds[name]),
                "speed_of_ours_over_it": statistics.median(seconds[name]) / ours,
                "peak_mib": max(memory[name]) / 2**20,
            }
            for name in STEP_CONTENDERS
        ],
    }


def run_steps(name: str, size: str, lengths: list[int], steps: int) -> tuple[list[float], int]:
    """Seconds of each timed step, and bytes by which they raised the process's peak memory."""
    import torch

    torch.manual_seed(0)
    model, step = (our_step if name == STEP_CONTENDERS[0] else transformers_step)(size, lengths, name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        step().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    before = peak_memory()
    train()  # the first step allocates optimizer state and picks kernels
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        train()
        times.append(time.perf_counter() - start)
    return times, peak_memory() - before


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def sample(lengths: list[int]):
    """(inputs, labels), int64, of one sequence a length: random residues under the recipes' mask."""
    import numpy as np
    import torch

    from esm2_composer.alphabet import AMINO_ACIDS, CLS, EOS
    from esm2_composer.masking import MaskingRule

    generator = np.random.default_rng(1)
    pairs = []
    for length in lengths:
        tokens = generator.choice(AMINO_ACIDS, length)
        tokens[0], tokens[-1] = CLS, EOS
        masked = MaskingRule().apply(tokens, generator.random(length))
        pairs.append([torch.from_numpy(part.astype(np.int64)) for part in masked])
    return pairs


def our_step(size: str, lengths: list[int], name: str) -> tuple:
    import torch
    import torch.nn.functional as F

    from esm2_composer.alphabet import PAD
    from esm2_composer.model import ESM2, SIZES

    inputs, labels = (torch.cat(parts) for parts in zip(*sample(lengths), strict=True))
    (positions,) = torch.nonzero(labels != PAD, as_tuple=True)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    model = ESM2(SIZES[size])

    def step() -> torch.Tensor:
        logits = model(inputs, cu_seqlens, max(lengths), positions)
        return F.cross_entropy(logits, labels[positions])

    return model, step


def transformers_step(size: str, lengths: list[int], name: str) -> tuple[object, Callable]:
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import EsmConfig, EsmForMaskedLM

    from esm2_composer.alphabet import PAD
    from esm2_composer.model import SIZES
    from esm2_composer.weights import hugging_face_config

    width = 1024 if name.endswith("1024") else max(lengths)
    inputs, labels = (
        pad_sequence([*parts, torch.full((width,), PAD)], batch_first=True, padding_value=PAD)[:-1]
        for parts in zip(*sample(lengths), strict=True)
    )
    attention_mask = (inputs != PAD).long()
    model = EsmForMaskedLM(EsmConfig(**hugging_face_config(SIZES[size])))

    def step() -> torch.Tensor:
        return model(inputs, attention_mask=attention_mask, labels=labels.masked_fill(labels == PAD, -100)).loss

    return model, step


def print_steps(result: dict) -> None:
    lines = [
        f"ESM-2 {result['size']}, {result['sequences']} sequences, {result['real_tokens']:,} real tokens, "
        f"longest {result['longest']}; torch {result['torch']}, {result['threads']} threads",
        f"{'':32} {'s/step':>8} {'real tok/s':>11} {'ours is':>8} {'peak MiB':>9}",
    ]
    lines += [
        f"{row['name']:32} {row['seconds_per_step']:8.3f} {row['real_tokens_per_second']:11,.0f} "
        f"{row['speed_of_ours_over_it']:7.2f}x {row['peak_mib']:9,.0f}"
        for row in result["contenders"]
    ]
    print("\n".join(lines), file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
