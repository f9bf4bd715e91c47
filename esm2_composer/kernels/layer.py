"""A layer as one node of autograd, on the kernels of `attention` and `elementwise`.

A host needs longer to launch a layer's kernels through autograd and torch.compile than a GPU to run them on a few
thousand tokens, which is what each of many GPUs has of a global batch (docs/performance.md). Here it does nothing
but launch them, forward in one function and backward in another. The numbers are those of `model.Layer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Literal, NamedTuple, TypeVar

import torch

from esm2_composer.attention import compute_dtype
from esm2_composer.kernels.attention import attend_backward, attend_forward
from esm2_composer.kernels.elementwise import add_norm, add_norm_backward, gelu, gelu_backward, sum_rows
from esm2_composer.product import Product


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

    The layer's modules are not called: hooks on them, or other modules in their place, have no effect. The
    `product` of `qkv` serves all four linear layers.
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


class Batch(NamedTuple):
    """Where the tokens are."""

    tables: torch.Tensor  # fp32, of the rotation
    cu_seqlens: torch.Tensor  # int32 (B+1,)
    positions: torch.Tensor | None  # int64 (M,), of the tokens whose results are wanted; None: of all


class Parameters(NamedTuple):
    """Weights, of products (out, in), and biases (out,), as `compute` hands them over; or their gradients."""

    w_norm1: torch.Tensor
    b_norm1: torch.Tensor
    w_qkv: torch.Tensor
    b_qkv: torch.Tensor
    w_out: torch.Tensor
    b_out: torch.Tensor
    w_norm2: torch.Tensor
    b_norm2: torch.Tensor
    w1: torch.Tensor
    b1: torch.Tensor
    w2: torch.Tensor
    b2: torch.Tensor


class Kept(NamedTuple):
    """What the backward pass needs besides what the products keep; M tokens have results that are wanted."""

    w_norm1: torch.Tensor
    w_norm2: torch.Tensor
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


Fields = TypeVar("Fields", Batch, Kept)


class TritonLayer(torch.autograd.Function):
    """See `compute`."""

    @staticmethod
    def forward(ctx, settings, x, update, tables, cu_seqlens, positions, *parameters) -> tuple:
        batch, parameters = Batch(tables, cu_seqlens, positions), Parameters(*parameters)
        with torch.cuda.device_of(x):  # Triton launches on the current one
            kept, of_products = _forward_to_hidden(settings, x, update, batch, parameters)
            out, of_last = settings.product.forward(gelu(kept.hidden), parameters.w2, parameters.b2)
        if settings.recomputes is True:
            saved = (kept.x, *parameters)
        elif settings.recomputes == "selective":
            saved = (*kept, *parameters)
        else:
            saved = (*kept, *chain(*of_products, of_last))
        ctx.settings, ctx.has_update = settings, update is not None
        ctx.save_for_backward(*batch, *saved)
        return kept.total, out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total, grad_update) -> tuple:
        settings, saved = ctx.settings, iter(ctx.saved_tensors)
        batch = _next(Batch, saved)
        with torch.cuda.device_of(grad_total):
            if settings.recomputes is True:
                x, parameters = next(saved), Parameters(*saved)
                kept, of_products = _forward_to_hidden(settings, x, None, batch, parameters)
                of_products.append(settings.product.keep(gelu(kept.hidden), parameters.w2))
            elif settings.recomputes == "selective":
                kept, parameters = _next(Kept, saved), Parameters(*saved)
                of_products = _of_products(settings, kept, batch, parameters)
            else:
                kept, rest = _next(Kept, saved), list(saved)
                each = len(rest) // 4
                of_products = [rest[i : i + each] for i in range(0, len(rest), each)]
            grad_x, grad_update, *grads = _backward(
                settings, kept, of_products, batch, grad_total.contiguous(), grad_update.contiguous()
            )
        return None, grad_x, grad_update if ctx.has_update else None, None, None, None, *grads


def _next(kind: type[Fields], saved: Iterator[torch.Tensor]) -> Fields:
    """As many of the tensors as it has fields."""
    return kind(*islice(saved, len(kind._fields)))


def _forward_to_hidden(
    settings: Settings, x: torch.Tensor, update: torch.Tensor | None, batch: Batch, parameters: Parameters
) -> tuple[Kept, list[tuple]]:
    """The layer without GELU and the last product; and what each of the other three products keeps.

    To compute that anew, give the sum of x and update as x, and no update.
    """
    p, positions = parameters, batch.positions
    eps, dtype, forward = settings.eps, settings.dtype, settings.product.forward
    x, normed, mean1, rstd1 = add_norm(x, update, p.w_norm1, p.b_norm1, eps, dtype)
    qkv, of_qkv = forward(normed, p.w_qkv, p.b_qkv)
    qkv = qkv.view(len(x), 3, settings.heads, -1)
    mixed, lse = attend_forward(qkv, batch.tables, batch.cu_seqlens, settings.max_seqlen)
    out, of_out = forward(_wanted(mixed.view(len(x), -1), positions), p.w_out, p.b_out)
    total, normed, mean2, rstd2 = add_norm(_wanted(x, positions), out, p.w_norm2, p.b_norm2, eps, dtype)
    hidden, of_hidden = forward(normed, p.w1, p.b1)
    kept = Kept(p.w_norm1, p.w_norm2, x, mean1, rstd1, qkv, mixed, lse, total, mean2, rstd2, hidden)
    return kept, [of_qkv, of_out, of_hidden]


def _wanted(rows: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """Of the rows (T, D) those of tokens whose results are wanted, (M, D)."""
    return rows if positions is None else rows.index_select(0, positions)


def _of_products(settings: Settings, kept: Kept, batch: Batch, parameters: Parameters) -> list[tuple]:
    """What the four products keep, from what they are given, computed anew."""
    p = parameters
    eps, dtype, keep = settings.eps, settings.dtype, settings.product.keep
    return [
        keep(add_norm(kept.x, None, p.w_norm1, p.b_norm1, eps, dtype)[1], p.w_qkv),
        keep(_wanted(kept.mixed.view(len(kept.x), -1), batch.positions), p.w_out),
        keep(add_norm(kept.total, None, p.w_norm2, p.b_norm2, eps, dtype)[1], p.w1),
        keep(gelu(kept.hidden), p.w2),
    ]


def _backward(
    settings: Settings,
    kept: Kept,
    of_products: list[tuple],
    batch: Batch,
    grad_total: torch.Tensor,
    grad_update: torch.Tensor,
) -> tuple:
    """The gradients of x, of what was added to it, and of the parameters."""
    of_qkv, of_out, of_hidden, of_last = of_products
    positions, backward = batch.positions, settings.product.backward
    grad, grad_w2 = backward(grad_update, *of_last)
    grad_b2 = sum_rows(grad_update)
    grad, grad_b1 = gelu_backward(kept.hidden, grad)
    grad, grad_w1 = backward(grad, *of_hidden)
    grad_total, grad, grad_w_norm2, grad_b_norm2 = add_norm_backward(
        grad_total, grad, kept.total, kept.w_norm2, kept.mean2, kept.rstd2
    )
    grad_b_out = sum_rows(grad)
    grad, grad_w_out = backward(grad, *of_out)
    if positions is not None:
        shape = kept.x.shape
        grad_total, grad = (each.new_zeros(shape).index_copy_(0, positions, each) for each in (grad_total, grad))
    grad = attend_backward(
        grad, kept.qkv, batch.tables, kept.mixed, kept.lse, batch.cu_seqlens, settings.max_seqlen
    ).flatten(1)
    grad_b_qkv = sum_rows(grad)
    grad, grad_w_qkv = backward(grad, *of_qkv)
    grad_x, grad_update, grad_w_norm1, grad_b_norm1 = add_norm_backward(
        grad_total, grad, kept.x, kept.w_norm1, kept.mean1, kept.rstd1
    )
    grads = Parameters(
        w_norm1=grad_w_norm1, b_norm1=grad_b_norm1, w_qkv=grad_w_qkv, b_qkv=grad_b_qkv,
        w_out=grad_w_out, b_out=grad_b_out, w_norm2=grad_w_norm2, b_norm2=grad_b_norm2,
        w1=grad_w1, b1=grad_b1, w2=grad_w2, b2=grad_b2,
    )  # fmt: skip
    return grad_x, grad_update, *grads
