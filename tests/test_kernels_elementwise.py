"""Sums with norm, GELU, and sums of rows in Triton equal torch's in float64, forward and backward.

Without a GPU Triton interprets them, one operation at a time, which a process must ask for before it imports them.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernels import interpreted

from esm2_composer.attention import TOLERANCE

SHAPES = [(1, 48), (33, 1280), (129, 320)]  # around the 32, 128 and, eight times as many, 256 rows of a program


def largest_errors(tokens: int, columns: int, stream: torch.dtype, dtype: torch.dtype, device: str) -> list[float]:
    """Relative: of the sum, its norm, that of a sum by itself, and their gradients; of GELU and its gradients; of
    a sum of rows."""
    from esm2_composer.kernels.elementwise import add_norm, add_norm_backward, gelu, gelu_backward, sum_rows

    generator = torch.Generator().manual_seed(tokens)

    def draw(kind: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, kind)

    shape = tokens, columns
    given = draw(stream, *shape), draw(dtype, *shape), *(draw(torch.float32, columns) for _ in range(2))
    hidden, grads = draw(dtype, *shape), (draw(stream, *shape), draw(dtype, *shape))
    tall = draw(dtype, 8 * tokens, columns)
    total, normed, mean, rstd = add_norm(*given, 1e-5, dtype)
    normed_again = add_norm(total, None, *given[2:], 1e-5, dtype)[1]
    grad_x, grad_update, *others = add_norm_backward(*grads, total, given[2], mean, rstd)
    activated, (grad_hidden, grad_bias) = gelu(hidden), gelu_backward(hidden, grads[1].clone())
    assert (total.dtype, normed.dtype, activated.dtype) == (stream, dtype, dtype)
    assert (grad_x.dtype, grad_update.dtype, grad_hidden.dtype) == (stream, dtype, dtype)
    ours = (
        total,
        normed,
        normed_again,
        grad_x,
        grad_update,
        *others,
        activated,
        grad_hidden,
        grad_bias,
        sum_rows(tall),
    )

    exact = [one.cpu().double().requires_grad_() for one in (*given, hidden)]
    grads = [grad.cpu().double() for grad in grads]
    summed = exact[0] + exact[1]
    norms, bent = (summed, F.layer_norm(summed, (columns,), *exact[2:4])), F.gelu(exact[4])
    of_norms = torch.autograd.grad(norms, exact[:4], grads)
    (of_gelu,) = torch.autograd.grad(bent, exact[4], grads[1])
    theirs = *norms, norms[1], *of_norms, bent, of_gelu, of_gelu.sum(0), tall.cpu().double().sum(0)
    return [((a.cpu().double() - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True)]


def test_interpreted_they_are_exact() -> None:
    printed = interpreted("test_kernels_elementwise.print_errors()")
    rows = [[float(error) for error in line.split()] for line in printed.splitlines()]
    assert len(rows) == 3 * len(SHAPES)
    for first, bound in ((0, 1e-6), (1, 2e-3), (2, 2e-3)):  # fp32; fp16 on an fp32 stream; fp16: there is no bf16
        assert all(error < bound for row in rows[first::3] for error in row)


def print_errors() -> None:
    full, half = torch.float32, torch.float16
    for shape in SHAPES:
        for stream, dtype in ((full, full), (full, half), (half, half)):
            print(*largest_errors(*shape, stream, dtype, "cpu"))


@pytest.mark.parametrize("change", [lambda x: 1.03 * x, lambda x: 0 * x, lambda x: x / 0])
@pytest.mark.parametrize(
    ("which", "place"),
    [
        *(("add_norm", place) for place in range(2)),
        *(("add_norm_backward", place) for place in range(4)),
        *(("gelu_backward", place) for place in range(2)),
        *(("gelu", None), ("sum_rows", None)),
    ],
)
def test_their_check_sees_rounding_only_where_they_are_right(which, place, change, monkeypatch) -> None:
    """torch's own in their place, and wrong ones."""
    from esm2_composer.kernels import elementwise as module

    def add_norm(x, update, weight, bias, eps, dtype):
        total = x if update is None else x + update
        normed = F.layer_norm(total.float(), weight.shape, weight.float(), bias.float(), eps)
        return total, normed.to(dtype), bias, None

    def add_norm_backward(grad_total, grad_normed, total, weight, bias, _):
        given = [x.float().requires_grad_() for x in (total, weight, bias)]
        normed = F.layer_norm(given[0], weight.shape, *given[1:])
        grad_x, *others = torch.autograd.grad(normed, given, grad_normed.float())
        return grad_total + grad_x, grad_total + grad_x, *others

    def gelu_backward(hidden, grad):
        hidden = hidden.float().requires_grad_()
        (grad,) = torch.autograd.grad(F.gelu(hidden), hidden, grad.float())
        return grad, grad.sum(0)

    right = {
        "add_norm": add_norm,
        "add_norm_backward": add_norm_backward,
        "gelu": F.gelu,
        "gelu_backward": gelu_backward,
        "sum_rows": lambda grad: grad.float().sum(0),
    }
    for name, function in right.items():
        monkeypatch.setattr(module, name, function)
    assert module.elementwise_error(torch.bfloat16, 320, "cpu") < TOLERANCE

    def wrong(*given):
        out = right[which](*given)
        return change(out) if place is None else (*out[:place], change(out[place]), *out[place + 1 :])

    monkeypatch.setattr(module, which, wrong)
    assert not module.elementwise_error(torch.bfloat16, 320, "cpu") < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [320, 480, 640, 1280, 2560, 5120])
def test_on_a_gpu_they_are_exact_within_their_type(columns: int, stream: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert all(error < 1e-2 for error in largest_errors(1000, columns, stream, torch.bfloat16, "cuda"))


@pytest.mark.gpu
def test_on_a_gpu_they_are_the_same_to_the_last_bit_every_time() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    first, second = (largest_errors(5000, 1280, torch.float32, torch.bfloat16, "cuda") for _ in range(2))
    assert first == second
