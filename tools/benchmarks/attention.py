"""Rotary embedding and attention of one layer, forward and backward, by every backend that runs here, on the same
flat batch of UniRef-like lengths: milliseconds, and operations per second.

In turns, so that none profits from a quiet moment of the machine. On a GPU in bf16, with the rotation compiled for
kernels that do not rotate, as in training; timed on the GPU, without launching.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.devices import add_device_argument
from benchmarks.lengths import uniref_like_lengths
from benchmarks.limits import compute_type

from esm2_composer.attention import Attention, rotate, select_attention
from esm2_composer.command import in_range
from esm2_composer.model import SIZES, rotary_frequencies, rotary_tables

BACKENDS = ("triton", "torch", "flash", "cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES])
    add_device_argument(parser)
    parser.add_argument(
        "--tokens", type=in_range(int, 1024), help="at most, in the batch; by default 65,536, on a CPU 2,048"
    )
    parser.add_argument("--rounds", type=in_range(int, 1), default=10)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    tokens = args.tokens or (65536 if args.device == "cuda" else 2048)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rows = [row for size in args.sizes for row in measure_size(size, args.device, tokens, args.rounds)]
    return {"device": device, "torch": torch.__version__, "rows": rows}


def measure_size(size: str, device: str, tokens: int, rounds: int) -> list[dict[str, Any]]:
    c, dtype = SIZES[size], compute_type(device)
    lengths = uniref_like_lengths(tokens // 30, 0)
    lengths = lengths[lengths.cumsum() <= tokens].tolist()
    places = torch.cat([torch.arange(length) for length in lengths])
    tables = rotary_tables(places, rotary_frequencies(c.head_size)).to(device)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    qkv = torch.randn(sum(lengths), 3, c.num_heads, c.head_size, device=device, dtype=dtype)
    grad = torch.randn_like(qkv[:, 0])
    backends = {}
    for name in BACKENDS if device == "cuda" else ("cpu",):
        try:
            backends[name] = select_attention(name, device, dtype, c.num_heads, c.head_size)
        except ValueError:
            continue  # it cannot run here
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in backends}
    for turn in range(rounds + 2):  # two warm up
        for name, attention in backends.items():
            one = functools.partial(once, attention, device, qkv, tables, cu_seqlens, max(lengths), grad)
            if turn >= 2:
                seconds[name].append(one())
            else:
                one()
    products = 4 * c.num_heads * c.head_size * sum(length**2 for length in lengths)  # of a forward pass
    rows = []
    for name, pairs in seconds.items():
        forward, backward = (statistics.median(times) for times in zip(*pairs, strict=True))
        rate = 3.5 * products / (forward + backward)
        rows.append({"size": size, "backend": name, "tokens": sum(lengths), "forward_seconds": forward,
                     "backward_seconds": backward, "flops": rate})  # fmt: skip
    return rows


def once(
    attention: Attention,
    device: str,
    qkv: torch.Tensor,
    tables: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    grad: torch.Tensor,
) -> tuple[float, float]:
    """Seconds of the forward and the backward pass."""
    leaf = qkv.clone().requires_grad_()
    given = leaf.clone()  # Triton's writes over it
    if device == "cuda":
        torch.cuda._sleep(10_000_000)  # cycles, in which all that follows is queued
    moments = [moment(device)]
    if attention.kernel is None:
        from esm2_composer.kernels.attention import attend

        out = attend(given, tables, cu_seqlens, longest)
    else:
        out = attention.kernel(*rotation(device)(given, tables), cu_seqlens, longest)
    moments.append(moment(device))
    out.backward(grad)
    moments.append(moment(device))
    forward, backward = (seconds_between(*pair) for pair in itertools.pairwise(moments))
    return forward, backward


@functools.cache
def rotation(device: str) -> Callable[..., tuple]:
    def rotated(qkv: torch.Tensor, tables: torch.Tensor) -> tuple:
        q, k, v = qkv.unbind(1)
        return rotate(q, *tables), rotate(k, *tables), v

    return torch.compile(rotated, dynamic=True) if device == "cuda" else rotated


def moment(device: str) -> float | torch.cuda.Event:
    """Now; on a GPU, when its queue gets there."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: float | torch.cuda.Event, stop: float | torch.cuda.Event) -> float:
    if isinstance(start, float):
        return stop - start
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def table(result: dict[str, Any]) -> str:
    lines = [
        f"rotation and attention of a layer on {result['device']}, torch {result['torch']}",
        f"{'':6} {'backend':8} {'tokens':>8} {'forward, ms':>12} {'backward, ms':>13} {'TFLOP/s':>8}",
    ]
    lines += [
        f"{row['size']:6} {row['backend']:8} {row['tokens']:8,} {row['forward_seconds'] * 1e3:12.3f} "
        f"{row['backward_seconds'] * 1e3:13.3f} {row['flops'] / 1e12:8.1f}"
        for row in result["rows"]
    ]
    return "\n".join(lines)
