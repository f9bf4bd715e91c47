"""A layer as one node of autograd, on the kernels of `attention` and `elementwise`.

A host needs longer to launch a layer's kernels through autograd and torch.compile than a GPU to run them on a few
thousand tokens, which is what each of many GPUs has of a global batch (docs/performance.md). Here it does nothing
but launch them, forward in one function and backward in another. The numbers are those of `model.Layer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Literal, NamedTuple

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
    recomputes: bool | Literal["selective"]


class Kept(NamedTuple):
    """What the backward pass needs besides what the products keep; M tokens have results that are wanted."""

    x: torch.Tensor  # (T, D), the sum of the inputs
    mean1: torch.Tensor  # fp32 (T,), as rstd1
    rstd1: torch.Tensor
    qkv: torch.Tensor  # (T, 3, H, K)
    mixed: torch.Tensor  # (T, H, K)
    lse: torch.Tensor  # fp32 (H, T)
    total: torch.Tensor  # (M, D), the sum after attention
    mean2: torch.Tensor  # fp32 (M,), as rstd2
    rstd2: torch.Tensor
    hidden: torch.Tensor  # (M, F), before GELU


class TritonLayer(torch.autograd.Function):
    """See `compute`."""

    @staticmethod
    def forward(ctx, settings, x, update, tables, cu_seqlens, positions, *parameters) -> tuple:
        batch = tables, cu_seqlens, positions
        with torch.cuda.device_of(x):  # Triton launches on the current one
            kept, of_products = _forward_to_hidden(settings, x, update, batch, parameters)
            out, of_last = settings.product.forward(gelu(kept.hidden), *parameters[-2:])
        saved = {False: (*kept, *chain(*of_products, of_last)), "selective": kept, True: kept[:1]}
        ctx.settings, ctx.has_update = settings, update is not None
        ctx.save_for_backward(*batch, *parameters, *saved[settings.recomputes])
        return kept.total, out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total, grad_update) -> tuple:
        settings, tensors = ctx.settings, ctx.saved_tensors
        batch, parameters, saved = tensors[:3], tensors[3:15], tensors[15:]
        with torch.cuda.device_of(grad_total):
            if settings.recomputes == "selective":
                kept = Kept(*saved)
                of_products = _of_products(settings, kept, batch, parameters)
            elif settings.recomputes:
                kept, of_products = _forward_to_hidden(settings, *saved, None, batch, parameters)
                of_products = reversed([*of_products, settings.product.keep(gelu(kept.hidden), parameters[-2])])
            else:
                kept, rest = Kept(*saved[:10]), saved[10:]
                each = len(rest) // 4
                of_products = (rest[i : i + each] for i in (3 * each, 2 * each, each, 0))
            grad_x, grad_update, *grads = _backward(
                settings, kept, of_products, batch, parameters, grad_total.contiguous(), grad_update.contiguous()
            )
        return None, grad_x, grad_update if ctx.has_update else None, None, None, None, *grads


def _forward_to_hidden(settings: Settings, x, update, batch: tuple, parameters: tuple) -> tuple[Kept, list[tuple]]:
    """The layer without GELU and the last product; and what each of the other three products keeps.

    To compute that anew, give the sum of x and update as x, and no update.
    """
    w_norm1, b_norm1, w_qkv, b_qkv, w_out, b_out, w_norm2, b_norm2, w1, b1, _, _ = parameters
    tables, cu_seqlens, positions = batch
    heads, eps, max_seqlen, dtype, product, _ = settings
    x, normed, mean1, rstd1 = add_norm(x, update, w_norm1, b_norm1, eps, dtype)
    qkv, of_qkv = product.forward(normed, w_qkv, b_qkv)
    qkv = qkv.view(len(x), 3, heads, -1)
    mixed, lse = attend_forward(qkv, tables, cu_seqlens, max_seqlen)
    out, of_out = product.forward(_wanted(mixed.view(x.shape), positions), w_out, b_out)
    total, normed, mean2, rstd2 = add_norm(_wanted(x, positions), out, w_norm2, b_norm2, eps, dtype)
    hidden, of_hidden = product.forward(normed, w1, b1)
    return Kept(x, mean1, rstd1, qkv, mixed, lse, total, mean2, rstd2, hidden), [of_qkv, of_out, of_hidden]


def _wanted(rows: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    return rows if positions is None else rows.index_select(0, positions)


def _of_products(settings: Settings, kept: Kept, batch: tuple, parameters: tuple) -> Iterator[tuple]:
    """What the products keep, the last one's first, each computed anew when it is asked for."""
    w_norm1, b_norm1, w_qkv, _, w_out, _, w_norm2, b_norm2, w1, _, w2, _ = parameters
    _, eps, _, dtype, product, _ = settings
    yield product.keep(gelu(kept.hidden), w2)
    yield product.keep(add_norm(kept.total, None, w_norm2, b_norm2, eps, dtype)[1], w1)
    yield product.keep(_wanted(kept.mixed.view(kept.x.shape), batch[-1]), w_out)
    yield product.keep(add_norm(kept.x, None, w_norm1, b_norm1, eps, dtype)[1], w_qkv)


def _backward(
    settings: Settings,
    kept: Kept,
    of_products: Iterator[tuple],
    batch: tuple,
    parameters: tuple,
    grad_total: torch.Tensor,
    grad_update: torch.Tensor,
) -> tuple:
    """The gradients of x, of what was added to it, and of the parameters; `of_products` as of `_of_products`."""
    x, mean1, rstd1, qkv, mixed, lse, total, mean2, rstd2, hidden = kept
    tables, cu_seqlens, positions = batch
    backward = settings.product.backward
    grad, grad_w2 = backward(grad_update, *next(of_products))
    grad_b2 = sum_rows(grad_update)
    grad, grad_b1 = gelu_backward(hidden, grad)
    grad, grad_w1 = backward(grad, *next(of_products))
    grad_total, grad, *grads_norm2 = add_norm_backward(grad_total, grad, total, parameters[6], mean2, rstd2)
    grad_b_out = sum_rows(grad)
    grad, grad_w_out = backward(grad, *next(of_products))
    if positions is not None:
        grad_total, grad = (each.new_zeros(x.shape).index_copy_(0, positions, each) for each in (grad_total, grad))
    grad = attend_backward(grad, qkv, tables, mixed, lse, cu_seqlens, settings.max_seqlen).flatten(1)
    grad_b_qkv = sum_rows(grad)
    grad, grad_w_qkv = backward(grad, *next(of_products))
    grad_x, grad_update, *grads_norm1 = add_norm_backward(grad_total, grad, x, parameters[0], mean1, rstd1)
    return (
        grad_x, grad_update, *grads_norm1, grad_w_qkv, grad_b_qkv, grad_w_out, grad_b_out,
        *grads_norm2, grad_w1, grad_b1, grad_w2, grad_b2,
    )  # fmt: skip
