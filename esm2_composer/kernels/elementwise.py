"""What a layer computes between its matrix products, in Triton: sums with layer norm, GELU, and the sums over
rows that are the biases' gradients.

Forward and backward are one pass over memory each, at its speed, and the backward pass also adds up what the
gradients of weights and biases need. torch's compiler takes 1.3 to 4.6 times as long (docs/performance.md).

T tokens, D columns of the residual stream, F of the feed-forward. A program adds up SUMMED rows, in their order,
and writes one row of sums: results are the same to the last bit every time. Tensors are contiguous, and on the
current GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from esm2_composer.kernels.checks import as_in_training, relative_error

# The best of a few dozen on an H200, for D of 320, 1,280 and 2,560, and four times these.
NORM_ROWS = 32  # a program adds up
GELU_ROWS, GELU_COLUMNS, GELU_SUMMED = 16, 128, 128  # a tile, and the rows that a program adds up
SUM_ROWS, SUM_COLUMNS, SUM_SUMMED = 32, 64, 256  # likewise, where nothing else is done
BLOCK = 4096  # elements of a program of GELU's forward pass
WARPS = 4


@triton.jit
def _add_norm(
    x, update, weight, bias, total, normed, mean, rstd, eps,
    D: tl.constexpr, WIDE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """A row: total = x + update, and its layer norm; if not ADD, that of x."""
    row, columns = tl.program_id(0), tl.arange(0, WIDE)
    offsets, inside = row.to(tl.int64) * D + columns, columns < D
    values = tl.load(x + offsets, inside, 0.0).to(tl.float32)
    if ADD:
        values += tl.load(update + offsets, inside, 0.0).to(tl.float32)
        values = values.to(total.dtype.element_ty)
        tl.store(total + offsets, values, inside)
        values = values.to(tl.float32)
    level = tl.sum(values) / D
    values = tl.where(inside, values - level, 0.0)
    scale = 1 / tl.sqrt(tl.sum(values * values) / D + eps)
    weights = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    biases = tl.load(bias + columns, inside, 0.0).to(tl.float32)
    tl.store(normed + offsets, (values * scale * weights + biases).to(normed.dtype.element_ty), inside)
    tl.store(mean + row, level)
    tl.store(rstd + row, scale)


@triton.jit(do_not_specialize=["tokens"])
def _add_norm_backward(
    grad_total, grad_normed, total, weight, mean, rstd, grad_x, grad_update, sums_weight, sums_bias, tokens,
    D: tl.constexpr, WIDE: tl.constexpr, SUMMED: tl.constexpr, BOTH: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """BOTH: the update's gradient, which is x's, is wanted in another type, too."""
    program, columns = tl.program_id(0), tl.arange(0, WIDE)
    inside = columns < D
    weights = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    sum_weight, sum_bias = tl.zeros((WIDE,), tl.float32), tl.zeros((WIDE,), tl.float32)
    for step in tl.range(0, SUMMED, num_stages=STAGES):
        row = program * SUMMED + step
        offsets, mask = row.to(tl.int64) * D + columns, inside & (row < tokens)
        scale = tl.load(rstd + row, row < tokens, 0.0)
        values = tl.load(total + offsets, mask, 0.0).to(tl.float32)
        values = tl.where(mask, (values - tl.load(mean + row, row < tokens, 0.0)) * scale, 0.0)
        grads = tl.load(grad_normed + offsets, mask, 0.0).to(tl.float32)
        sum_weight += grads * values
        sum_bias += grads
        grads *= weights
        along, level = tl.sum(grads * values) / D, tl.sum(grads) / D
        grads = (grads - values * along - level) * scale + tl.load(grad_total + offsets, mask, 0.0).to(tl.float32)
        tl.store(grad_x + offsets, grads.to(grad_x.dtype.element_ty), mask)
        if BOTH:
            tl.store(grad_update + offsets, grads.to(grad_update.dtype.element_ty), mask)
    tl.store(sums_weight + program * D + columns, sum_weight, inside)
    tl.store(sums_bias + program * D + columns, sum_bias, inside)


@triton.jit
def _normal(x):
    """exp(-x^2 / 2), and the share of the standard normal distribution that lies below x.

    The share by Abramowitz and Stegun, 7.1.26, to 7.5e-8 and fp32's rounding: a third fewer instructions than erf,
    which limit these kernels, and the exponential is one for both.
    """
    density = tl.exp2(x * x * -0.7213475204444817)
    t = 1 / (1 + 0.23164188 * tl.abs(x))
    tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    tail *= density
    return density, tl.where(x < 0, tail, 1 - tail)


@triton.jit
def _gelu(hidden, out, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(hidden + offsets, offsets < size, 0.0).to(tl.float32)
    _, share = _normal(x)
    tl.store(out + offsets, (x * share).to(out.dtype.element_ty), offsets < size)


@triton.jit(do_not_specialize=["tokens"])
def _gelu_backward(
    hidden, grad, sums, tokens,
    F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    columns, program = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(1)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, SUMMED, ROWS):
        rows = program * SUMMED + step + tl.arange(0, ROWS)
        offsets = rows.to(tl.int64)[:, None] * F + columns[None, :]
        mask = (rows < tokens)[:, None] & (columns < F)[None, :]
        x = tl.load(hidden + offsets, mask, 0.0).to(tl.float32)
        density, share = _normal(x)
        slope = share + x * density * 0.3989422804014327  # 1 / sqrt(2 pi)
        grads = tl.load(grad + offsets, mask, 0.0).to(tl.float32) * slope
        tl.store(grad + offsets, grads.to(grad.dtype.element_ty), mask)
        total += grads
    tl.store(sums + program * F + columns, tl.sum(total, 0), columns < F)


@triton.jit(do_not_specialize=["tokens"])
def _sum_rows(
    grad, sums, tokens, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUMMED: tl.constexpr
):  # fmt: skip
    columns, program = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(1)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, SUMMED, ROWS):
        rows = program * SUMMED + step + tl.arange(0, ROWS)
        offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]
        mask = (rows < tokens)[:, None] & (columns < C)[None, :]
        total += tl.load(grad + offsets, mask, 0.0).to(tl.float32)
    tl.store(sums + program * C + columns, tl.sum(total, 0), columns < C)


def _width(columns: int) -> dict[str, int]:
    wide = triton.next_power_of_2(columns)
    return {"WIDE": wide, "num_warps": min(max(wide // 1024, 1), 16)}


def _stages(columns: int, itemsize: int) -> int:
    """Rows on their way to a program, of a residual stream of so many bytes a number: in up to 98 KB of shared
    memory, which all GPUs have."""
    row = triton.next_power_of_2(columns) * itemsize
    return 3 if row <= 16384 else 2 if row <= 32768 else 1


def add_norm(
    x: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """A sum and its layer norm (Ba, Kiros and Hinton, 2016).

    Args:
        x: (T, D).
        update: (T, D), of another type perhaps; or None.
        weight, bias: (D,).
        eps: added to the variance.
        dtype: of the norm.

    Returns:
        x + update, (T, D) in the type of x, or x if there is no update; its norm, (T, D); and, for the backward
        pass, each row's mean and 1 / deviation, fp32 (T,).
    """
    tokens, d = x.shape
    total = x if update is None else torch.empty_like(x)
    normed = torch.empty_like(x, dtype=dtype)
    mean, rstd = (x.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    added = x if update is None else update
    _add_norm[(tokens,)](
        x, added, weight, bias, total, normed, mean, rstd, eps, D=d, ADD=update is not None, **_width(d)
    )
    return total, normed, mean, rstd


def add_norm_backward(
    grad_total: torch.Tensor, grad_normed: torch.Tensor, total: torch.Tensor, weight: torch.Tensor,
    mean: torch.Tensor, rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradients of x and of the update, (T, D), one tensor if their types are the same; and those of weight
    and bias, fp32 (D,)."""
    tokens, d = total.shape
    both, programs = grad_normed.dtype != total.dtype, triton.cdiv(tokens, NORM_ROWS)
    grad_x = torch.empty_like(total)
    grad_update = torch.empty_like(grad_normed) if both else grad_x
    sums = total.new_empty(2, programs, d, dtype=torch.float32)
    _add_norm_backward[(programs,)](
        grad_total, grad_normed, total, weight, mean, rstd, grad_x, grad_update, sums[0], sums[1], tokens,
        D=d, SUMMED=NORM_ROWS, BOTH=both, STAGES=_stages(d, total.element_size()), **_width(d),
    )  # fmt: skip
    return grad_x, grad_update, *sums.sum(1)


def gelu(hidden: torch.Tensor) -> torch.Tensor:
    """GELU (Hendrycks and Gimpel, 2016), not its approximation by tanh, of hidden (T, F)."""
    out, size = torch.empty_like(hidden), hidden.numel()
    _gelu[(triton.cdiv(size, BLOCK),)](hidden, out, size, BLOCK=BLOCK, num_warps=WARPS)
    return out


def gelu_backward(hidden: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of hidden (T, F), written over that of the output, `grad` (T, F); and its sum over tokens, fp32
    (F,): that of a bias that was added before."""
    tokens, f = hidden.shape
    programs = triton.cdiv(tokens, GELU_SUMMED)
    sums = hidden.new_empty(programs, f, dtype=torch.float32)
    _gelu_backward[(triton.cdiv(f, GELU_COLUMNS), programs)](
        hidden, grad, sums, tokens,
        F=f, ROWS=GELU_ROWS, COLUMNS=GELU_COLUMNS, SUMMED=GELU_SUMMED, num_warps=WARPS,
    )  # fmt: skip
    return grad, sums.sum(0)


def sum_rows(grad: torch.Tensor) -> torch.Tensor:
    """The sum over tokens of (T, C), fp32 (C,): a bias's gradient."""
    tokens, c = grad.shape
    programs = triton.cdiv(tokens, SUM_SUMMED)
    sums = grad.new_empty(programs, c, dtype=torch.float32)
    _sum_rows[(triton.cdiv(c, SUM_COLUMNS), programs)](
        grad, sums, tokens, C=c, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, SUMMED=SUM_SUMMED, num_warps=WARPS
    )
    return sums.sum(0)


def elementwise_error(dtype: torch.dtype, columns: int, device: str) -> float:
    """The largest relative error of sums with norm, of GELU on four times the columns, as in all published models,
    of the gradients of both, and of sums of rows on this device, beside torch's in fp32; NaN if any is."""
    ours, theirs = [], []
    with as_in_training(device):
        generator = torch.Generator().manual_seed(0)

        def draw(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        for stream in (torch.float32, dtype):  # as under autocast, and as under FSDP, with their weights
            given = *(draw(each, 100, columns) for each in (stream, dtype)), *(draw(stream, columns) for _ in "wb")
            grads = draw(stream, 100, columns), draw(dtype, 100, columns)
            total, normed, mean, rstd = add_norm(*given, 1e-5, dtype)
            normed_again = add_norm(total, None, *given[2:], 1e-5, dtype)[1]
            ours += total, normed, normed_again, *add_norm_backward(*grads, total, given[2], mean, rstd)
            exact = [x.float().requires_grad_() for x in given]
            summed = exact[0] + exact[1]
            want = summed, F.layer_norm(summed, (columns,), *exact[2:])
            theirs += *want, want[1], *torch.autograd.grad(want, exact, [grad.float() for grad in grads])
        hidden, grad = draw(dtype, 300, 4 * columns), draw(dtype, 300, 4 * columns)
        exact = hidden.float().requires_grad_()
        want = F.gelu(exact)
        (wanted,) = torch.autograd.grad(want, exact, grad.float())
        theirs += want, wanted, wanted.sum(0), grad.float().sum(0)
        ours += gelu(hidden), *gelu_backward(hidden, grad.clone()), sum_rows(grad)
        return relative_error(ours, theirs)
