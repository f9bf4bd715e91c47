"""A layer as one node of autograd, on the kernels of `attention` and `elementwise`.

A host needs longer to launch a layer's kernels through autograd and torch.compile than a GPU to run them on a few
thousand tokens, which is what each of many GPUs has of a global batch (docs/performance.md). Here it does nothing
but launch them, forward in one function and backward in another. The numbers are those of `model.Layer`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from esm2_composer.attention import compute_dtype
from esm2_composer.kernels.attention import attend_backward, attend_forward
from esm2_composer.kernels.elementwise import add_norm, add_norm_backward, gelu, gelu_backward, sum_rows
from esm2_composer.model import Product


def compute(
    layer: torch.nn.Module,
    x: torch.Tensor,
    update: torch.Tensor | None,
    tables: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`model.Layer.forward`, of the layer, on a GPU, in fp16 or bf16.

    The layer's modules are not called: hooks on them, and what other modules in their place compute, have no
    effect; and the product of `qkv` stands for all four.
    """
    parameters = [
        parameter
        for part in (layer.attention_norm, layer.qkv, layer.out, layer.ffn_norm, layer.fc1, layer.fc2)
        for parameter in (part.weight, part.bias)  # FSDP has tensors in the place of parameters
    ]
    dtype = compute_dtype(x)
    x, update = x.contiguous(), None if update is None else update.to(dtype).contiguous()
    batch = tables.view(torch.float32), cu_seqlens, positions
    settings = Settings(
        layer.num_heads, layer.attention_norm.eps, max_seqlen, dtype, layer.qkv.product, layer.recomputes
    )
    return TritonLayer.apply(settings, x, update, *batch, *parameters)


class Settings(NamedTuple):
    """What is no tensor."""

    heads: int
    eps: float
    max_seqlen: int
    dtype: torch.dtype  # of products and what is to be added to x
    product: Product
    recomputes: bool


class TritonLayer(torch.autograd.Function):
    """See `compute`."""

    @staticmethod
    def forward(ctx, settings, x, update, tables, cu_seqlens, positions, *parameters) -> tuple:
        batch = tables, cu_seqlens, positions
        total, out, kept = _forward(settings, x, update, *batch, *parameters)
        ctx.settings, ctx.has_update = settings, update is not None
        ctx.save_for_backward(*(kept[0], *batch, *parameters) if settings.recomputes else kept)
        return total, out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total, grad_update) -> tuple:
        kept = ctx.saved_tensors
        if ctx.settings.recomputes:
            x, *others = kept
            _, _, kept = _forward(ctx.settings, x, None, *others, with_output=False)
        grad_x, grad_update, *grads = _backward(
            ctx.settings, kept, grad_total.contiguous(), grad_update.contiguous()
        )
        return None, grad_x, grad_update if ctx.has_update else None, None, None, None, *grads


def _forward(
    settings: Settings, x, update, tables, cu_seqlens, positions, *parameters, with_output: bool = True
) -> tuple:
    """x and update for the next layer, and what `_backward` needs, of which the first is the sum of those given.

    To compute that anew, give this sum as x and no update; without the output, update is None, and the last
    product is not computed.
    """
    w_norm1, b_norm1, w_qkv, b_qkv, w_out, b_out, w_norm2, b_norm2, w1, b1, w2, b2 = parameters
    heads, eps, max_seqlen, dtype, product, _ = settings
    with torch.cuda.device_of(x):  # Triton launches on the current one
        x, normed, mean1, rstd1 = add_norm(x, update, w_norm1, b_norm1, eps, dtype)
        qkv, kept_qkv = product.forward(normed, w_qkv, b_qkv)
        qkv = qkv.view(len(x), 3, heads, -1)
        mixed, lse = attend_forward(qkv, tables, cu_seqlens, max_seqlen)
        wanted, mixed_wanted = x, mixed.view(len(x), -1)
        if positions is not None:
            wanted, mixed_wanted = (each.index_select(0, positions) for each in (wanted, mixed_wanted))
        out, kept_out = product.forward(mixed_wanted, w_out, b_out)
        total, normed, mean2, rstd2 = add_norm(wanted, out, w_norm2, b_norm2, eps, dtype)
        hidden, kept1 = product.forward(normed, w1, b1)
        activated = gelu(hidden)
        update, kept2 = product.forward(activated, w2, b2) if with_output else (None, product.keep(activated, w2))
    kept = (
        x, w_norm1, mean1, rstd1, qkv, tables, mixed, lse, cu_seqlens, positions, total, w_norm2, mean2, rstd2,
        hidden, *kept_qkv, *kept_out, *kept1, *kept2,
    )  # fmt: skip
    return total, update, kept


def _backward(settings: Settings, kept: tuple, grad_total: torch.Tensor, grad_update: torch.Tensor) -> tuple:
    """The gradients of x, of what was added to it, and of the parameters."""
    (
        x, w_norm1, mean1, rstd1, qkv, tables, mixed, lse, cu_seqlens, positions, total, w_norm2, mean2, rstd2,
        hidden, *of_products,
    ) = kept  # fmt: skip
    backward, each = settings.product.backward, len(of_products) // 4
    kept_qkv, kept_out, kept1, kept2 = (of_products[i : i + each] for i in range(0, len(of_products), each))
    with torch.cuda.device_of(x):
        grad, grad_w2 = backward(grad_update, *kept2)
        grad_b2 = sum_rows(grad_update)
        grad, grad_b1 = gelu_backward(hidden, grad)
        grad, grad_w1 = backward(grad, *kept1)
        grad_total, grad, *grads_norm2 = add_norm_backward(grad_total, grad, total, w_norm2, mean2, rstd2)
        grad_b_out = sum_rows(grad)
        grad, grad_w_out = backward(grad, *kept_out)
        if positions is not None:
            grad_total, grad = (
                each.new_zeros(x.shape).index_copy_(0, positions, each) for each in (grad_total, grad)
            )
        grad = attend_backward(grad, qkv, tables, mixed, lse, cu_seqlens, settings.max_seqlen).flatten(1)
        grad_b_qkv = sum_rows(grad)
        grad, grad_w_qkv = backward(grad, *kept_qkv)
        grad_x, grad_update, *grads_norm1 = add_norm_backward(grad_total, grad, x, w_norm1, mean1, rstd1)
    return (
        grad_x, grad_update, *grads_norm1, grad_w_qkv, grad_b_qkv, grad_w_out, grad_b_out,
        *grads_norm2, grad_w1, grad_b1, grad_w2, grad_b2,
    )  # fmt: skip
