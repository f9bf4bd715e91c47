"""Rounding to fp8 in Triton: a matrix and its transpose at once.

A product of fp8 numbers reads both its matrices along the dimension that it sums over, so a layer's inputs,
weights and gradients are needed in both orders. Two passes over memory: one finds the largest number, one writes
both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, BLOCKS = 4096, 8  # elements per block, and blocks per program that looks for the largest
ROWS, COLUMNS = 64, 128  # a tile of a program that rounds
WARPS = 4


@triton.jit
def _largest(x, largest, size, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK * BLOCKS
    best = tl.zeros((BLOCK,), tl.float32)
    for block in range(BLOCKS):
        offsets = first + block * BLOCK + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.abs(tl.load(x + offsets, offsets < size, 0.0).to(tl.float32)))
    tl.atomic_max(largest, tl.max(best))


@triton.jit(do_not_specialize=["rows"])
def _round(
    x, largest, rounded, transposed, scale, rows, limit,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of x (rows, WIDTH), which goes to `rounded`, and to `transposed`, (WIDTH, rows), rows filled up with
    zeros to a multiple of 16. Times `scale`, they are x."""
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    offsets = own.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    inside = columns[None, :] < WIDTH
    mask = (own < rows)[:, None] & inside
    factor = limit / tl.maximum(tl.load(largest), 1e-12)
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(scale, 1 / factor)
    values = (tl.load(x + offsets, mask, 0.0).to(tl.float32) * factor).to(rounded.dtype.element_ty)
    tl.store(rounded + offsets, values, mask)
    filled = tl.cdiv(rows, 16) * 16
    offsets = columns.to(tl.int64)[None, :] * filled + own[:, None]
    tl.store(transposed + offsets, values, (own < filled)[:, None] & inside)


def round_both(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (R, C), bf16 or fp16, C a multiple of 16 -> x / scale rounded, (R, C); its transpose, (C, R to the next
    multiple of 16), filled with zeros; and the scale, fp32 ()."""
    (rows, width), x = x.shape, x.contiguous()
    rounded = x.new_empty(x.shape, dtype=dtype)
    transposed = x.new_empty(width, triton.cdiv(rows, 16) * 16, dtype=dtype)
    largest, scale = x.new_zeros((), dtype=torch.float32), x.new_empty((), dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current one
        _largest[(triton.cdiv(x.numel(), BLOCK * BLOCKS),)](
            x, largest, x.numel(), BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=WARPS
        )
        _round[(triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))](
            x, largest, rounded, transposed, scale, rows, torch.finfo(dtype).max,
            WIDTH=width, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
    return rounded, transposed, scale
