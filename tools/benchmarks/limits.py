"""What the device itself can do: a large matrix product and a large copy, measured where the models run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from esm2_composer.recipe.gpus import gpu_named


@dataclass(frozen=True)
class Limits:
    device: str
    peak_flops: float | None  # the maker's figure for bf16, where we know it
    product_flops: float  # operations a second of a large product, in the type that models compute in here
    copy_bytes: float  # bytes a second, read and written, of a large copy
    memory: float | None  # bytes of the GPU


def measure_limits(device: str) -> Limits:
    on_gpu = device == "cuda"
    size, megabytes = (8192, 1024) if on_gpu else (2048, 256)
    a, b = (torch.randn(size, size, device=device, dtype=compute_type(device)) for _ in range(2))
    source = torch.zeros(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    gpu = gpu_named(name)
    return Limits(
        device=name,
        peak_flops=gpu and gpu.flops,
        product_flops=2 * size**3 / seconds_of(lambda: torch.mm(a, b), device),
        copy_bytes=2 * source.nbytes / seconds_of(lambda: target.copy_(source), device),
        memory=torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
    )


def compute_type(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def seconds_of(work: Callable[[], object], device: str) -> float:
    """The median of several times, after warm-up; on a GPU each is the mean of many in a row: launching takes time
    too, and a rested GPU is faster than a busy one."""
    times, row = [], 20 if device == "cuda" else 1
    for turn in range(13):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(row):
            work()
        synchronize(device)
        if turn >= 3:
            times.append((time.perf_counter() - start) / row)
    return statistics.median(times)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
