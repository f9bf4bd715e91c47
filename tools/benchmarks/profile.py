"""Where the time of a training step goes: matrix products, attention, the optimizer, all other computation (norms,
GELU, rotation, casts, sums), and idle time; and what each part would take at the speed of a large matrix product
and of a large copy, both measured in the same run.

By torch's profiler, over steps of this project through Composer's Trainer. On a GPU the parts are the kernels it
ran and the rest is its idle time; on a CPU they are torch's operators, and the rest is Python, Composer and the
profiler. Counted too: how often a step read a value to the host, and how often the host waited for the device.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.contenders import Work, make_trainer, recipe_of
from benchmarks.limits import Limits, compute_type, measure_limits
from benchmarks.step import add_work_arguments, in_own_process, make_work

from esm2_composer.errors import UserError
from esm2_composer.model import SIZES
from esm2_composer.recipe.architecture import skeleton

# The first that fits names the part of a kernel or an operator. FlashAttention's kernels name CUTLASS too.
PARTS = {
    "attention": r"flash|fmha|scaled_dot_product|^_(rotate|forward|backward_q|backward_kv)$",
    "optimizer": r"adam|multi_tensor|_foreach_|lpnorm|linalg_vector_norm",
    "matrix products": r"gemm|cutlass|nvjet|cublas|xmma|aten::(addmm|mm|bmm|linear)$|mkl|_mm\b",
}
OTHER = "all else that computes"
REST = "nothing computes"
WAITS = {"item": r"^aten::_local_scalar_dense$", "device": r"^cuda(Stream|Device|Event)Synchronize$"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_work_arguments(parser)
    parser.add_argument("--compile", action="store_true", help="the layers, on a CPU")
    parser.add_argument("--sharded", action="store_true", help="by FSDP, as the recipe has it")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if args.compile and args.device == "cuda":
        raise UserError("--compile: on a GPU whole layers are in Triton, and nothing is left to compile")
    limits = in_own_process(measure_limits, args.device)
    work = make_work(args, limits)
    found = in_own_process(profile_steps, work, args.compile, args.sharded)
    return {
        "size": work.size,
        "device": limits.device,
        "torch": torch.__version__,
        "compile": args.compile,
        "sharded": args.sharded,
        "steps": work.steps,
        "real_tokens_per_step": statistics.fmean(sum(lengths) for lengths in _profiled(work)),
        **found,
        "at_best": at_best(work, limits, args.sharded and recipe_of(args.size, sharded=True).fsdp is not None),
    }


def _profiled(work: Work) -> list[list[int]]:
    return [work.batches[(work.warmup + step) % len(work.batches)] for step in range(work.steps)]


def profile_steps(
    work: Work, compiled: bool, sharded: bool = False, make: Callable[..., Any] = make_trainer
) -> dict[str, Any]:
    """Seconds of a step of the Trainer that `make` makes, of each part of it, and how often it waits."""
    from composer.core import Callback
    from torch.profiler import ProfilerActivity, profile

    on_gpu = work.device == "cuda"
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
    moments: list[float] = []

    class Profile(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            done = state.timestamp.batch.value
            if done == work.warmup:
                profiler.start()
                moments.append(time.perf_counter())
            elif done == work.warmup + work.steps:
                moments.append(time.perf_counter())  # the device is done: Composer has read the loss
                profiler.stop()

    trainer = make(work, compiled, sharded=sharded, callbacks=(Profile(),))
    trainer.fit()
    trainer.close()
    seconds = (moments[1] - moments[0]) / work.steps
    parts = kernels(profiler) if on_gpu else operators(profiler)
    shares = {part: spent / work.steps for part, spent in parts.items()}
    shares[REST] = max(0.0, seconds - sum(shares.values()))
    return {"seconds_per_step": seconds, "parts": shares, "waits_per_step": waits(profiler, work.steps)}


def waits(profiler: Any, steps: int) -> dict[str, float]:
    """How often a step read a value to the host, and how often the host waited for the device."""
    counts = {event.key: event.count for event in profiler.key_averages()}
    return {
        wait: sum(count for name, count in counts.items() if re.search(pattern, name)) / steps
        for wait, pattern in WAITS.items()
    }


def is_work(event: Any) -> bool:
    """Whether an event is an operator or a kernel, and not a range that something named: an optimizer's step,
    with Composer's whole update inside, or a compiled region, with the checks whether it fits; nor the profiler's
    note that the host waited for a place in the GPU's queue."""
    return not event.is_user_annotation and not re.match(r"Torch(-Compiled|Dynamo)|Command Buffer", event.key)


def part_of(name: str) -> str:
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


def operators(profiler: Any) -> dict[str, float]:
    """Seconds that each part's operators took themselves, in all threads."""
    parts = dict.fromkeys([*PARTS, OTHER], 0.0)
    for event in filter(is_work, profiler.key_averages()):
        parts[part_of(event.key)] += event.self_cpu_time_total / 1e6
    return parts


def kernels(profiler: Any) -> dict[str, float]:
    """Seconds in which a kernel of each part ran; of two that overlap the later gets the rest."""
    parts = dict.fromkeys([*PARTS, OTHER], 0.0)
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    end = 0.0
    for event in sorted(filter(is_work, events), key=lambda e: e.time_range.start):
        start, stop = event.time_range.start, event.time_range.end
        parts[part_of(event.name)] += max(0.0, stop - max(start, end)) / 1e6
        end = max(end, stop)
    return parts


def at_best(work: Work, limits: Limits, sharded: bool = False) -> dict[str, float]:
    """Seconds of a step that each part takes at the limits measured: its operations at the speed of a large
    product, or its bytes at that of a large copy, whichever limits it."""
    c = SIZES[work.size]
    model = skeleton(c)
    batches = _profiled(work)
    tokens = statistics.fmean(map(sum, batches))
    pairs = statistics.fmean(sum(n * n for n in batch) for batch in batches)  # of tokens that see each other
    attention = 12 * c.num_layers * c.hidden_size * pairs
    operations = statistics.fmean(model.flops(batch, round(0.15 * sum(batch))) for batch in batches)
    itemsize = compute_type(work.device).itemsize
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    numbers = c.num_layers * c.hidden_size * tokens  # of the residual stream, in all layers
    best = {
        "attention": attention / limits.product_flops,
        # AdamW reads weight, gradient and two moments and writes three; clipping reads and scales gradients.
        "optimizer": (28 + 12) * trained / limits.copy_bytes,
        "matrix products": (operations - attention) / limits.product_flops,
        OTHER: _pointwise_bytes(c, itemsize, itemsize if sharded else 4) * numbers / limits.copy_bytes,
        REST: 0.0,
    }
    # Rotation reads and writes q and k; on a GPU attention does it, and has them in registers backward.
    part, times = (OTHER, 8) if work.device == "cpu" else ("attention", 4)
    best[part] += times * itemsize * numbers / limits.copy_bytes
    return best


def _pointwise_bytes(c: Any, itemsize: int, residual: int) -> float:
    """Bytes that a layer's norms, sums and GELU move for a number of the residual stream, forward and backward, if
    what lies between two products is one pass that reads its inputs and writes its outputs once.

    Either norm reads and writes the stream, of `residual` bytes a number; backward it reads the stream and its
    gradient, and writes that: 5 times. In numbers of `itemsize` it reads what is to be added and writes what is
    normed, and backward the other way round: 4 times. GELU, over the width of the feed-forward, reads and writes
    once, its gradient reads twice and writes once.
    """
    return 2 * (5 * residual + 4 * itemsize) + 5 * itemsize * c.ffn_hidden_size / c.hidden_size


def table(result: dict[str, Any]) -> str:
    seconds, best = result["seconds_per_step"], result["at_best"]
    how = f"{', compiled' if result['compile'] else ''}{', FSDP' if result['sharded'] else ''}"
    lines = [
        f"ESM-2 {result['size']}{how} on {result['device']}, torch {result['torch']}: a step of "
        f"{result['real_tokens_per_step']:,.0f} tokens, mean of {result['steps']}",
        f"{'':24} {'ms':>10} {'share':>7} {'at best, ms':>12}",
    ]
    lines += [
        f"{part:24} {spent * 1e3:10,.1f} {spent / seconds:7.1%} {best[part] * 1e3:12,.1f}"
        for part, spent in result["parts"].items()
    ]
    lines.append(f"{'a step':24} {seconds * 1e3:10,.1f} {1:7.0%} {sum(best.values()) * 1e3:12,.1f}")
    waits = result["waits_per_step"]
    lines.append(f"a step reads {waits['item']:.1f} values and waits {waits['device']:.1f} times for the device")
    return "\n".join(lines)
