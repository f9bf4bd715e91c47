"""The layers' matrix products in fp8: an option for GPUs of compute capability 9.0 or newer (H100, B200).

Weights, optimizer, norms, attention and the head stay as they are; the inputs and weights of the four products of
a layer are rounded to e4m3 and their gradients to e5m2 (Micikevicius et al., FP8 Formats for Deep Learning, 2022),
each tensor with its own scale, computed at each use. What it gives up: a scale belongs to a whole microbatch, so
the other sequences in it change a sequence's last digits, and so does the number of ranks.

On a CPU the numbers are rounded as on a GPU (where fp32 weights become bf16 first), and multiplied in fp32: for
tests.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from esm2_composer.errors import UserError
from esm2_composer.kernels.checks import as_in_training, failure_line, missing_for_triton, relative_error
from esm2_composer.model import ESM2
from esm2_composer.product import Product

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TOLERANCE = 1e-2  # relative, of a product in bf16


def use_fp8(net: ESM2) -> None:
    """Let the layers' linear modules multiply in fp8; parameters and names stay.

    Args:
        net: to be changed before it is compiled.

    Raises:
        UserError: a dimension is not a multiple of 16, or this GPU cannot do it.
    """
    sizes = net.config.hidden_size, net.config.ffn_hidden_size
    if any(size % 16 for size in sizes):
        raise UserError("fp8: hidden_size and ffn_hidden_size must be multiples of 16")
    if torch.cuda.is_available():
        _check_gpu(*sizes)
    for layer in net.layers:  # the head has few inputs, which need more precision than fp8
        for module in (layer.qkv, layer.out, layer.fc1, layer.fc2):
            module.product = FP8


def _check_gpu(k: int, n: int) -> None:
    gpu = torch.cuda.get_device_name()
    if torch.cuda.get_device_capability() < (9, 0):  # on an 8.9, Triton rounds through fp16, towards zero
        raise UserError(f"fp8: {gpu} has no fp8 products that will do; an H100 or newer has")
    if lack := missing_for_triton():
        raise UserError(f"fp8: {lack} is missing")
    try:
        error = product_error(k, n, "cuda")
    except Exception as failure:  # compilers fail in many ways
        raise UserError(f"fp8: products on {gpu} fail ({failure_line(failure)})") from failure
    if not error < TOLERANCE:
        raise UserError(f"fp8: products on {gpu} are off by {error:.1e}")


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x (T, K), weight (N, K), bias (N,) -> x weight^T + bias, (T, N), as `F.linear`; under autocast too."""
    if torch.is_autocast_enabled(x.device.type):  # as `compute_dtype` does, but torch.compile can trace this
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return torch.ops.esm2_composer.fp8_product(x, weight, bias)[0]


def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, tuple]:
    """x weight^T + bias, (T, N) in the type of x; and, for the backward pass, the transposes of x and weight in
    fp8, (K, T to the next multiple of 16) and (K, N), and their scales, fp32 ()."""
    rounded, x_transposed, x_scale = _round(x, E4M3)
    rounded_weight, weight_transposed, weight_scale = _round(weight, E4M3)
    out = _multiply(rounded, rounded_weight, x_scale, weight_scale, x.dtype, bias)
    return out, (x_transposed, weight_transposed, x_scale, weight_scale)


def keep(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What `forward` keeps for the backward pass, without the product."""
    _, x_transposed, x_scale = _round(x, E4M3)
    _, weight_transposed, weight_scale = _round(weight, E4M3)
    return x_transposed, weight_transposed, x_scale, weight_scale


def backward(
    grad: torch.Tensor,
    x_transposed: torch.Tensor,
    weight_transposed: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x, (T, K), and weight, (N, K), in the type of grad, (T, N)."""
    rounded, transposed, scale = _round(grad, E5M2)
    # Summed in full precision, which takes longer: gradients need it, outputs do not.
    grad_x = _multiply(rounded, weight_transposed, scale, weight_scale, grad.dtype)
    grad_weight = _multiply(transposed, x_transposed, scale, x_scale, grad.dtype)
    return grad_x, grad_weight


# Custom operators: autograd gets their formula, and torch.compile does not look inside.


@torch.library.custom_op("esm2_composer::fp8_product", mutates_args=())
def fp8_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    out, kept = forward(x, weight, bias)
    return out, *kept


@fp8_product.register_fake
def _(x, weight, bias):
    (tokens, k), n = x.shape, weight.shape[0]
    x_transposed = x.new_empty(k, _to_16(tokens), dtype=E4M3)
    x_scale, weight_scale = (x.new_empty((), dtype=torch.float32) for _ in range(2))
    return x.new_empty(tokens, n), x_transposed, x.new_empty(k, n, dtype=E4M3), x_scale, weight_scale


fp8_product_backward = torch.library.custom_op("esm2_composer::fp8_product_backward", backward, mutates_args=())


@fp8_product_backward.register_fake
def _(grad, x_transposed, weight_transposed, x_scale, weight_scale):
    k, n = weight_transposed.shape
    return grad.new_empty(grad.shape[0], k), grad.new_empty(n, k)


def _set_up(ctx, inputs: tuple, output: tuple) -> None:
    _, weight, bias = inputs
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.weight_type, ctx.bias_type = weight.dtype, bias.dtype


def _gradients(ctx, grad: torch.Tensor, *_) -> tuple:
    grad_x, grad_weight = fp8_product_backward(grad, *ctx.saved_tensors)
    grad_bias = grad.sum(0).to(ctx.bias_type) if ctx.needs_input_grad[2] else None
    return grad_x, grad_weight.to(ctx.weight_type), grad_bias


fp8_product.register_autograd(_gradients, setup_context=_set_up)

FP8 = Product(product, forward, keep, backward)


def _round(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `kernels.fp8.round_both`."""
    if x.is_cuda:
        from esm2_composer.kernels.fp8 import round_both

        # Of an fp32 matrix, Triton 3.6 wrote a quarter of the transpose into wrong places (on an H200).
        return round_both(x if x.dtype.itemsize == 2 else x.bfloat16(), dtype)
    scale = x.abs().max().float().clamp(min=1e-12) / torch.finfo(dtype).max
    rounded = (x.float() / scale).to(dtype)
    filled = F.pad(rounded.float(), (0, 0, 0, _to_16(len(x)) - len(x)))
    return rounded, filled.t().contiguous().to(dtype), scale


def _to_16(number: int) -> int:
    return (number + 15) // 16 * 16


def _multiply(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """a b^T of a (M, K) and b (N, K), with their scales, plus the bias (N,)."""
    if a.is_cuda:
        fast = bias is not None
        bias = bias.to(dtype) if fast else None
        return torch._scaled_mm(a, b.t(), a_scale, b_scale, bias, out_dtype=dtype, use_fast_accum=fast)
    with torch.autocast(a.device.type, enabled=False):
        out = (a.float() * a_scale) @ (b.float() * b_scale).t()
    return (out if bias is None else out + bias).to(dtype)


def product_error(k: int, n: int, device: str) -> float:
    """The largest relative error of a product and its gradients on this device in bf16, weights in fp32, versus a
    CPU's in fp32, rounded alike; NaN if any is."""
    with as_in_training(device):
        generator = torch.Generator().manual_seed(0)
        sizes = (300, k), (n, k), (n,), (300, n)
        drawn = [torch.randn(size, generator=generator).bfloat16() for size in sizes]
        found = []
        for place, dtype in ((device, torch.bfloat16), ("cpu", torch.float32)):
            x, weight, bias, grad = (y.to(place).requires_grad_() for y in drawn)
            inputs = x.to(dtype), weight.float(), bias.float()
            out = product(*inputs)
            found.append((out, *torch.autograd.grad(out, inputs, grad.to(dtype))))
        return relative_error(*found)
