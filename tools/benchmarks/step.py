"""Training steps (forward, backward, clip, AdamW) of one model on the same batches of UniRef-like lengths, by this
project and by transformers' EsmForMaskedLM, padded to 1,024 and to the longest of a batch: real tokens a second,
and by how much the process's memory grew at most.

Every contender runs in a process of its own, the contenders in turns, so that none profits from another's
memory or from a quiet moment of the machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.lengths import uniref_like_lengths

from esm2_composer.errors import UserError

CONTENDERS = ("esm2_composer", "transformers, padded to 1024", "transformers, padded to longest")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="8m", help="8m, 35m, 150m, 650m, 3b or 15b")
    parser.add_argument("--sequences", type=int, default=16, help="sequences a batch, of UniRef-like lengths")
    parser.add_argument("--batches", type=int, default=4, help="different batches")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every contender, over all batches")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run every contender over all batches, `rounds` times in turns."""
    import torch

    from esm2_composer.model import SIZES

    if args.size not in SIZES:
        raise UserError(f"--size {args.size}; there are: {', '.join(SIZES)}")
    if min(args.sequences, args.batches, args.rounds) < 1:
        raise UserError("--sequences, --batches and --rounds must be at least 1")
    batches = [uniref_like_lengths(args.sequences, seed).tolist() for seed in range(args.batches)]
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    memory: dict[str, list[int]] = {name: [] for name in CONTENDERS}
    context = multiprocessing.get_context("spawn")
    for turn in range(args.rounds):
        for name in CONTENDERS:
            print(f"round {turn + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
            with context.Pool(1) as pool:  # a new process each time
                elapsed, peak = pool.apply(run_steps, (name, args.size, batches))
            seconds[name].append(elapsed)
            memory[name].append(peak)
    tokens = sum(map(sum, batches))
    ours = statistics.median(seconds[CONTENDERS[0]])
    return {
        "size": args.size,
        "batches": len(batches),
        "sequences": len(batches[0]),
        "real_tokens": tokens,
        "fill_at_1024": tokens / (1024 * sum(map(len, batches))),
        "fill_at_longest": tokens / sum(max(lengths) * len(lengths) for lengths in batches),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "contenders": [
            {
                "name": name,
                "seconds_per_step": statistics.median(seconds[name]) / len(batches),
                "real_tokens_per_second": tokens / statistics.median(seconds[name]),
                "speed_of_ours_over_it": statistics.median(seconds[name]) / ours,
                "peak_mib": max(memory[name]) / 2**20,
            }
            for name in CONTENDERS
        ],
    }


def run_steps(name: str, size: str, batches: list[list[int]]) -> tuple[float, int]:
    """Seconds for a step on every batch, after a first one, and bytes by which all that raised peak memory."""
    import torch
    from transformers import EsmConfig, EsmForMaskedLM

    from esm2_composer.model import ESM2, SIZES
    from esm2_composer.weights import hugging_face_config

    torch.manual_seed(0)
    if name == CONTENDERS[0]:
        model, prepare, loss = ESM2(SIZES[size]), flat_batch, flat_loss
    else:
        model = EsmForMaskedLM(EsmConfig(**hugging_face_config(SIZES[size])))
        prepare, loss = padded_batch(1024 if name.endswith("1024") else None), padded_loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    prepared = [prepare(lengths) for lengths in batches]

    def train(batch: tuple) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model, *batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    before = peak_memory()
    train(prepared[0])  # the first step allocates optimizer state
    start = time.perf_counter()
    for batch in prepared:
        train(batch)
    return time.perf_counter() - start, peak_memory() - before


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


def flat_batch(lengths: list[int]) -> tuple:
    import torch

    from esm2_composer.alphabet import PAD

    inputs, labels = (torch.cat(parts) for parts in zip(*sample(lengths), strict=True))
    (positions,) = torch.nonzero(labels != PAD, as_tuple=True)
    return inputs, torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths), positions, labels[positions]


def flat_loss(model, tokens, cu_seqlens, max_seqlen, positions, targets):
    from torch.nn.functional import cross_entropy

    return cross_entropy(model(tokens, cu_seqlens, max_seqlen, positions), targets)


def padded_batch(width: int | None) -> Callable[[list[int]], tuple]:
    """Batches padded to `width` tokens, or to their longest sequence."""
    import torch
    import torch.nn.functional as F

    from esm2_composer.alphabet import PAD

    def prepare(lengths: list[int]) -> tuple:
        target = width or max(lengths)
        inputs, labels = (
            torch.stack([F.pad(part, (0, target - len(part)), value=PAD) for part in parts])
            for parts in zip(*sample(lengths), strict=True)
        )
        return inputs, (inputs != PAD).long(), labels.masked_fill(labels == PAD, -100)

    return prepare


def padded_loss(model, inputs, attention_mask, labels):
    return model(inputs, attention_mask=attention_mask, labels=labels).loss


def table(result: dict[str, Any]) -> str:
    lines = [
        f"ESM-2 {result['size']}, {result['batches']} batches of {result['sequences']} sequences, "
        f"{result['real_tokens']:,} real tokens: {result['fill_at_1024']:.0%} of the slots at 1,024, "
        f"{result['fill_at_longest']:.0%} at the longest; torch {result['torch']}, {result['threads']} threads",
        f"{'':32} {'s/step':>8} {'real tok/s':>11} {'ours is':>8} {'peak MiB':>9}",
    ]
    lines += [
        f"{row['name']:32} {row['seconds_per_step']:8.3f} {row['real_tokens_per_second']:11,.0f} "
        f"{row['speed_of_ours_over_it']:7.2f}x {row['peak_mib']:9,.0f}"
        for row in result["contenders"]
    ]
    return "\n".join(lines)
