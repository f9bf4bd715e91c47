"""Rotary embedding and FlashAttention in Triton, for sequences of proteins' lengths, laid end to end.

The method is that of FlashAttention-2 (Dao, 2023): scores are never whole in memory, and the backward pass
recomputes them. Why not its own kernel: that is made for sequences of thousands and heads of 64 and more, and
takes 1.3 to 2 times as long for ESM-2's (docs/performance.md). Triton comes with torch.

Each program computes one tile of one sequence and head: of queries in the forward pass and for q's gradient, of
keys for k's and v's. Each tile is written by one program, so results are the same to the last bit every time. The
rotation (see `attention.rotate`) is undone in registers, before gradients of q and k are written, and these lie
where the product that comes next reads them, which saves several passes over all three.

Scores are in base 2, which is what the hardware has. T tokens, B sequences, H heads, K head size, WIDE the power
of two of at least 16 that holds K: half of a row of q lies in each half of WIDE, and zeros behind it. Tensors are
contiguous, and on the current GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Rows of a program's own tile, and of those it loops over: the best of a dozen on an H100, heads of 32 and 64.
OWN, OTHER, WARPS, STAGES = 64, 32, 4, 3
ROTATED_ROWS = 64


@triton.jit
def _sequence(cu_seqlens, tiles):
    """Where this program's sequence starts, its length, and which of its at most `tiles` tiles is meant."""
    sequence = tl.program_id(0) // tiles
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    return start, (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32), tl.program_id(0) % tiles


@triton.jit
def _columns(K: tl.constexpr, WIDE: tl.constexpr):
    """Of the WIDE places in a row: the column of K in each, and whether there is one."""
    place = tl.arange(0, WIDE)
    if K == WIDE:
        return place, place < K
    return place // (WIDE // 2) * (K // 2) + place % (WIDE // 2), place % (WIDE // 2) < K // 2


@triton.jit
def _load(matrix, stride, rows, length, columns, inside, WHOLE: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):
    """Rows of one head; zeros beyond `length` rows and K columns. WHOLE: all rows are there."""
    pointers = matrix + rows[:, None] * stride + columns[None, :]
    if WHOLE and K == WIDE:
        return tl.load(pointers)
    if WHOLE:
        return tl.load(pointers, inside[None, :], 0.0)
    return tl.load(pointers, (rows < length)[:, None] & inside[None, :], 0.0)


@triton.jit
def _store(matrix, stride, rows, length, columns, inside, values):
    pointers = matrix + rows[:, None] * stride + columns[None, :]
    tl.store(pointers, values.to(matrix.dtype.element_ty), (rows < length)[:, None] & inside[None, :])


@triton.jit
def _store_unrotated(
    matrix, stride, rows, length, tables, tokens, values, K: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Gradients of rotated rows, turned back: the transpose of the rotation."""
    halves = tl.reshape(values, (values.shape[0], 2, WIDE // 2)).permute(0, 2, 1)
    first, second = tl.split(halves)
    column = tl.arange(0, WIDE // 2)
    mask = (rows < length)[:, None] & (column < K // 2)[None, :]
    angles = tables + rows[:, None] * (K // 2) + column[None, :]
    cos, sin = tl.load(angles, mask, 0.0), tl.load(angles + tokens * (K // 2), mask, 0.0)
    pointers = matrix + rows[:, None] * stride + column[None, :]
    tl.store(pointers, (first * cos + second * sin).to(matrix.dtype.element_ty), mask)
    tl.store(pointers + K // 2, (second * cos - first * sin).to(matrix.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["tokens"])
def _rotate(qkv, tables, tokens, H: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    """Rotate q and k of qkv (T, 3, H, K) in place; tables fp32 (2, T, K / 2)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of the 2 H of every token
    token, column = (row // (2 * H)).to(tl.int64), tl.arange(0, WIDE // 2)
    mask = (token < tokens)[:, None] & (column < K // 2)[None, :]
    angles = tables + token[:, None] * (K // 2) + column[None, :]
    cos, sin = tl.load(angles, mask, 0.0), tl.load(angles + tokens * (K // 2), mask, 0.0)
    pointers = qkv + (token * (3 * H * K) + row % (2 * H) * K)[:, None] + column[None, :]
    first = tl.load(pointers, mask, 0.0).to(tl.float32)
    second = tl.load(pointers + K // 2, mask, 0.0).to(tl.float32)
    tl.store(pointers, (first * cos - second * sin).to(qkv.dtype.element_ty), mask)
    tl.store(pointers + K // 2, (second * cos + first * sin).to(qkv.dtype.element_ty), mask)


@triton.jit
def _softmax_tile(
    acc, top, total, queries, k, v, rows, length, columns, inside, scale,
    WHOLE: tl.constexpr, ROW: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The running sum, its largest score and its weight, after one more tile of keys."""
    keys = _load(k, ROW, rows, length, columns, inside, WHOLE, K, WIDE)
    scores = tl.dot(queries, tl.trans(keys))
    if not WHOLE:
        scores = tl.where((rows < length)[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - higher[:, None])
    shrink = tl.exp2(top - higher)
    values = _load(v, ROW, rows, length, columns, inside, WHOLE, K, WIDE)
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None])
    return acc, higher, total * shrink + tl.sum(p, 1)


@triton.jit(do_not_specialize=["tokens", "tiles"])
def _forward(
    qkv, out, lse, cu_seqlens, tokens, tiles, scale,
    H: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """out (T, H, K) and the logarithms (base 2) of the softmax's sums, lse (H, T)."""
    ROW: tl.constexpr = 3 * H * K
    start, length, tile = _sequence(cu_seqlens, tiles)
    head = tl.program_id(1)
    if tile * QUERIES >= length:
        return
    q = qkv + start * ROW + head * K
    k, v = q + H * K, q + 2 * H * K
    rows, others = tile * QUERIES + tl.arange(0, QUERIES), tl.arange(0, KEYS)
    columns, inside = _columns(K, WIDE)
    scale *= LOG2_E
    queries = _load(q, ROW, rows, length, columns, inside, False, K, WIDE)
    acc = tl.zeros((QUERIES, WIDE), tl.float32)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    whole = length // KEYS * KEYS
    for key in range(0, whole, KEYS):
        acc, top, total = _softmax_tile(
            acc, top, total, queries, k, v, key + others, length, columns, inside, scale, True, ROW, K, WIDE
        )
    if whole < length:
        acc, top, total = _softmax_tile(
            acc, top, total, queries, k, v, whole + others, length, columns, inside, scale, False, ROW, K, WIDE
        )
    _store(out + start * H * K + head * K, H * K, rows, length, columns, inside, acc / total[:, None])
    tl.store(lse + head * tokens + start + rows, top + tl.log2(total), rows < length)


@triton.jit
def _grad_q_tile(
    acc, queries, grads, norms, deltas, k, v, rows, length, columns, inside, scale,
    WHOLE: tl.constexpr, ROW: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    keys = _load(k, ROW, rows, length, columns, inside, WHOLE, K, WIDE)
    values = _load(v, ROW, rows, length, columns, inside, WHOLE, K, WIDE)
    p = tl.exp2(tl.dot(queries, tl.trans(keys)) * scale - norms[:, None])
    if not WHOLE:
        p = tl.where((rows < length)[None, :], p, 0.0)
    grad_scores = p * (tl.dot(grads, tl.trans(values)) - deltas[:, None])
    return tl.dot(grad_scores.to(keys.dtype), keys, acc)


@triton.jit(do_not_specialize=["tokens", "tiles"])
def _backward_q(
    out, qkv, tables, grad, lse, delta, grad_qkv, cu_seqlens, tokens, tiles, scale,
    H: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradient of q, and delta (H, T), each row's product of output and its gradient."""
    ROW: tl.constexpr = 3 * H * K
    start, length, tile = _sequence(cu_seqlens, tiles)
    head = tl.program_id(1)
    if tile * QUERIES >= length:
        return
    q = qkv + start * ROW + head * K
    k, v = q + H * K, q + 2 * H * K
    rows, others = tile * QUERIES + tl.arange(0, QUERIES), tl.arange(0, KEYS)
    columns, inside = _columns(K, WIDE)
    queries = _load(q, ROW, rows, length, columns, inside, False, K, WIDE)
    outs = _load(out + start * H * K + head * K, H * K, rows, length, columns, inside, False, K, WIDE)
    grads = _load(grad + start * H * K + head * K, H * K, rows, length, columns, inside, False, K, WIDE)
    deltas = tl.sum(outs.to(tl.float32) * grads.to(tl.float32), 1)
    tl.store(delta + head * tokens + start + rows, deltas, rows < length)
    norms = tl.load(lse + head * tokens + start + rows, rows < length, float("inf"))
    acc = tl.zeros((QUERIES, WIDE), tl.float32)
    whole = length // KEYS * KEYS
    for key in range(0, whole, KEYS):
        acc = _grad_q_tile(
            acc, queries, grads, norms, deltas, k, v, key + others, length, columns, inside, scale * LOG2_E,
            True, ROW, K, WIDE,
        )  # fmt: skip
    if whole < length:
        acc = _grad_q_tile(
            acc, queries, grads, norms, deltas, k, v, whole + others, length, columns, inside, scale * LOG2_E,
            False, ROW, K, WIDE,
        )  # fmt: skip
    grad_q = grad_qkv + start * ROW + head * K
    _store_unrotated(grad_q, ROW, rows, length, tables + start * (K // 2), tokens, acc * scale, K, WIDE)


@triton.jit
def _grad_kv_tile(
    acc_k, acc_v, keys, values, q, grad, lse, delta, rows, length, columns, inside, scale,
    WHOLE: tl.constexpr, ROW: tl.constexpr, GRAD_ROW: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    queries = _load(q, ROW, rows, length, columns, inside, WHOLE, K, WIDE)
    grads = _load(grad, GRAD_ROW, rows, length, columns, inside, WHOLE, K, WIDE)
    if WHOLE:
        norms, deltas = tl.load(lse + rows), tl.load(delta + rows)
    else:
        norms = tl.load(lse + rows, rows < length, float("inf"))  # for which p is zero
        deltas = tl.load(delta + rows, rows < length, 0.0)
    p = tl.exp2(tl.dot(keys, tl.trans(queries)) * scale - norms[None, :])
    acc_v = tl.dot(p.to(grads.dtype), grads, acc_v)
    grad_scores = p * (tl.dot(values, tl.trans(grads)) - deltas[None, :])
    return tl.dot(grad_scores.to(queries.dtype), queries, acc_k), acc_v


@triton.jit(do_not_specialize=["tokens", "tiles"])
def _backward_kv(
    qkv, tables, grad, lse, delta, grad_qkv, cu_seqlens, tokens, tiles, scale,
    H: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """The gradients of k and v, after `_backward_q`."""
    ROW: tl.constexpr = 3 * H * K
    start, length, tile = _sequence(cu_seqlens, tiles)
    head = tl.program_id(1)
    if tile * KEYS >= length:
        return
    q = qkv + start * ROW + head * K
    grad += start * H * K + head * K
    lse += head * tokens + start
    delta += head * tokens + start
    rows, others = tile * KEYS + tl.arange(0, KEYS), tl.arange(0, QUERIES)
    columns, inside = _columns(K, WIDE)
    keys = _load(q + H * K, ROW, rows, length, columns, inside, False, K, WIDE)
    values = _load(q + 2 * H * K, ROW, rows, length, columns, inside, False, K, WIDE)
    acc_k = tl.zeros((KEYS, WIDE), tl.float32)
    acc_v = tl.zeros((KEYS, WIDE), tl.float32)
    whole = length // QUERIES * QUERIES
    for query in range(0, whole, QUERIES):
        acc_k, acc_v = _grad_kv_tile(
            acc_k, acc_v, keys, values, q, grad, lse, delta, query + others, length, columns, inside,
            scale * LOG2_E, True, ROW, H * K, K, WIDE,
        )  # fmt: skip
    if whole < length:
        acc_k, acc_v = _grad_kv_tile(
            acc_k, acc_v, keys, values, q, grad, lse, delta, whole + others, length, columns, inside,
            scale * LOG2_E, False, ROW, H * K, K, WIDE,
        )  # fmt: skip
    grad_k = grad_qkv + start * ROW + (H + head) * K
    _store_unrotated(grad_k, ROW, rows, length, tables + start * (K // 2), tokens, acc_k * scale, K, WIDE)
    _store(grad_k + H * K, ROW, rows, length, columns, inside, acc_v)


def attend_forward(
    qkv: torch.Tensor, tables: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(rotated q (rotated k)^T / sqrt(K)) v, of each sequence by itself.

    Args:
        qkv: fp16 or bf16 (T, 3, H, K), contiguous, not rotated. q and k in it ARE OVERWRITTEN by the rotated ones.
        tables: fp32 (2, T, 1, K / 2), contiguous, cosines and sines.
        cu_seqlens: int32 (B+1,), where each sequence starts, and T at the end.
        max_seqlen: the longest sequence.

    Returns:
        (T, H, K), in the type of qkv; and, for the backward pass, the logarithms (base 2) of the softmax's sums,
        fp32 (H, T).
    """
    assert qkv.is_contiguous()
    assert tables.is_contiguous()
    tokens, _, heads, size = qkv.shape
    out = qkv.new_empty(tokens, heads, size)
    lse = qkv.new_empty(heads, tokens, dtype=torch.float32)
    grid, numbers = _sizes(qkv, cu_seqlens, max_seqlen)
    rows = triton.cdiv(tokens * 2 * heads, ROTATED_ROWS)
    _rotate[(rows,)](qkv, tables, tokens, *numbers[3:6], ROTATED_ROWS)  # H, K and WIDE
    _forward[grid](qkv, out, lse, cu_seqlens, *numbers, num_warps=WARPS, num_stages=STAGES)
    return out, lse


def attend_backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    tables: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
) -> torch.Tensor:
    """The gradient of qkv as it was before its rotation, (T, 3, H, K), from that of out, (T, H, K), contiguous."""
    delta, grad_qkv = torch.empty_like(lse), torch.empty_like(qkv)
    grid, numbers = _sizes(qkv, cu_seqlens, max_seqlen)
    together = qkv, tables, grad, lse, delta, grad_qkv, cu_seqlens, *numbers
    _backward_q[grid](out, *together, num_warps=WARPS, num_stages=STAGES)
    _backward_kv[grid](*together, num_warps=WARPS, num_stages=STAGES)
    return grad_qkv


def _sizes(qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int) -> tuple[tuple, tuple]:
    """The programs, and the numbers that every kernel but the rotation takes last."""
    tokens, _, heads, size = qkv.shape
    wide, tiles = max(16, triton.next_power_of_2(size)), triton.cdiv(max_seqlen, OWN)
    grid = tiles * (len(cu_seqlens) - 1), heads
    return grid, (tokens, tiles, size**-0.5, heads, size, wide, OWN, OTHER)


class RotatedAttention(torch.autograd.Function):
    """`attend_forward` by itself, where no layer computes it."""

    @staticmethod
    def forward(
        ctx, qkv: torch.Tensor, tables: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
    ) -> torch.Tensor:
        out, lse = attend_forward(qkv, tables, cu_seqlens, max_seqlen)
        ctx.save_for_backward(qkv, tables, out, lse, cu_seqlens)
        ctx.max_seqlen = max_seqlen
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple:
        grad_qkv = attend_backward(grad.contiguous(), *ctx.saved_tensors, ctx.max_seqlen)
        return grad_qkv, None, None, None


attend = RotatedAttention.apply
