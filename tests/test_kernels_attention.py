"""The Triton kernels equal rotation and attention in float64, forward and backward.

Without a GPU Triton interprets them, one operation at a time, which a process must ask for before it imports them.
"""

from __future__ import annotations

import pytest
import torch
from kernels import interpreted

from esm2_composer.kernels.checks import relative_error
from esm2_composer.model import rotary_frequencies, rotary_tables

LENGTHS = [1, 5, 31, 32, 33, 64, 70, 130]  # around the tiles' 32 and 64


def rotated(x: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    cos, sin = tables.double()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def exact(qkv: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """softmax(rotated q (rotated k)^T / sqrt(K)) v in float64, one sequence at a time."""
    q, k, v = qkv.unbind(1)
    rows = [x.split(LENGTHS) for x in (rotated(q, tables), rotated(k, tables), v)]
    out = []
    for q1, k1, v1 in zip(*rows, strict=True):
        scores = torch.einsum("qhd,khd->hqk", q1, k1) / q.shape[-1] ** 0.5
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v1))
    return torch.cat(out)


def largest_error(head_size: int, heads: int, dtype: torch.dtype, device: str) -> float:
    """Relative, of the output and the gradients of q, k and v."""
    from esm2_composer.kernels.attention import attend

    generator = torch.Generator().manual_seed(head_size)
    qkv = torch.randn(sum(LENGTHS), 3, heads, head_size, generator=generator).to(dtype)
    weights = torch.randn(sum(LENGTHS), heads, head_size, generator=generator)
    places = torch.cat([torch.arange(length) for length in LENGTHS])
    tables = rotary_tables(places, rotary_frequencies(head_size))
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    theirs, ours = qkv.double().requires_grad_(), qkv.to(device).requires_grad_()
    out = attend(ours.clone(), tables.to(device), cu_seqlens.to(device), max(LENGTHS))
    expected = exact(theirs, tables)
    (out.float() * weights.to(device)).sum().backward()
    (expected * weights).sum().backward()
    return relative_error((out, *ours.grad.unbind(1)), (expected, *theirs.grad.unbind(1)))


SIZES = [(8, 3), (24, 2), (64, 1)]


def test_interpreted_they_are_exact() -> None:
    errors = [float(line) for line in interpreted(f"test_kernels_attention.print_errors({SIZES})").split()]
    assert len(errors) == 2 * len(SIZES)
    assert all(error < 1e-6 for error in errors[::2])  # fp32
    assert all(error < 2e-3 for error in errors[1::2])  # fp16; the interpreter has no bf16


def print_errors(sizes: list[tuple[int, int]]) -> None:
    for size, heads in sizes:
        print(*(largest_error(size, heads, dtype, "cpu") for dtype in (torch.float32, torch.float16)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [8, 16, 24, 32, 64, 128])
def test_on_a_gpu_they_are_exact_within_their_type(head_size: int, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert largest_error(head_size, 20, dtype, "cuda") < (1e-2 if dtype == torch.bfloat16 else 2e-3)
