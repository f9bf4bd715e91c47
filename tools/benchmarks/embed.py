"""Embeddings of the same proteins, of UniRef-like lengths, by this project and by transformers, padded to
the longest in batches of input order: real tokens a second.

Both run in one process, in turns, so that neither profits from a quiet moment of the machine.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable

from esm2_composer.command import in_range
from esm2_composer.model import SIZES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="8m")
    parser.add_argument(
        "--proteins", type=in_range(int, 1), default=256, help="of UniRef-like lengths, cropped to 1,022"
    )
    parser.add_argument(
        "--batch-tokens", type=in_range(int, 1024), default=16384, help="ours: tokens computed at a time"
    )
    parser.add_argument(
        "--batch-sizes",
        type=in_range(int, 1),
        nargs="+",
        default=[8, 32],
        help="transformers': proteins computed at a time",
    )
    parser.add_argument("--rounds", type=in_range(int, 1), default=3, help="turns of every contender")


def measure(args: argparse.Namespace) -> dict:
    """Embed the same proteins with every contender, `rounds` times in turns."""
    import torch
    from benchmarks.lengths import uniref_like_lengths
    from transformers import EsmConfig, EsmModel

    from esm2_composer.embedding import Embedder
    from esm2_composer.model import ESM2
    from esm2_composer.weights.hugging_face import hugging_face_config

    torch.manual_seed(0)
    generator = random.Random(0)
    lengths = (uniref_like_lengths(args.proteins, 0) - 2).tolist()
    proteins = ["".join(generator.choices("ACDEFGHIKLMNPQRSTVWY", k=length)) for length in lengths]
    config = SIZES[args.size]
    ours = Embedder(ESM2(config).eval(), config.num_layers, 1024, args.batch_tokens, per_residue=False)
    theirs = EsmModel(EsmConfig(**hugging_face_config(config)), add_pooling_layer=False).eval()
    contenders = {"esm2_composer": lambda: embed_flat(ours, proteins)}
    for size in args.batch_sizes:
        contenders[f"transformers, batches of {size}"] = lambda size=size: embed_padded(theirs, proteins, size)

    embed_flat(ours, proteins[:8])  # the first call does more than its own work
    embed_padded(theirs, proteins[:8], 8)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(args.rounds):
        for name, embed in contenders.items():
            print(f"round {turn + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
            seconds[name].append(time_of(embed))
    tokens = sum(lengths) + 2 * len(lengths)
    best = statistics.median(seconds["esm2_composer"])
    return {
        "size": args.size,
        "proteins": len(proteins),
        "real_tokens": tokens,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "contenders": [
            {
                "name": name,
                "real_tokens_per_second": tokens / statistics.median(taken),
                "speed_of_ours_over_it": statistics.median(taken) / best,
            }
            for name, taken in seconds.items()
        ],
    }


def time_of(embed: Callable[[], object]) -> float:
    start = time.perf_counter()
    embed()
    return time.perf_counter() - start


def embed_flat(embedder, proteins: list[str]):
    """Means over residues (N, D), in the order of `proteins`, as tools/embed.py makes them."""
    named = ((str(i), residues.encode()) for i, residues in enumerate(proteins))
    return [embedder.rows(chunk) for chunk in embedder.chunks(named)]


def embed_padded(model, proteins: list[str], batch_size: int):
    """The same by transformers, as its users write it: the order of the input, padded to a batch's longest."""
    import numpy as np
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from esm2_composer.alphabet import PAD, encode

    means = []
    for start in range(0, len(proteins), batch_size):
        encoded = [encode(residues.encode()).astype(np.int64) for residues in proteins[start : start + batch_size]]
        batch = pad_sequence([torch.from_numpy(ids) for ids in encoded], batch_first=True, padding_value=PAD)
        with torch.inference_mode():
            hidden = model(batch, attention_mask=(batch != PAD).long()).last_hidden_state
        means += [row[1 : len(ids) - 1].mean(0) for row, ids in zip(hidden, encoded, strict=True)]
    return torch.stack(means)


def table(result: dict) -> str:
    lines = [
        f"ESM-2 {result['size']}, {result['proteins']} proteins, {result['real_tokens']:,} real tokens; "
        f"torch {result['torch']}, {result['threads']} threads",
        f"{'':32} {'real tok/s':>11} {'ours is':>8}",
    ]
    lines += [
        f"{row['name']:32} {row['real_tokens_per_second']:11,.0f} {row['speed_of_ours_over_it']:7.2f}x"
        for row in result["contenders"]
    ]
    return "\n".join(lines)
