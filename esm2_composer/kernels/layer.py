"""A layer as one node of autograd, on the kernels of `attention` and `elementwise`.

A host needs longer to launch a layer's kernels through autograd and torch.compile than a GPU to run them on a few
thousand tokens, which is what each of many GPUs has of a global batch (docs/performance.md). Here it does nothing
but launch them, forward in one function and backward in another. The numbers are those of `model.Layer`.
"""

from __future__ import annotations

import torch

from esm2_composer.attention import compute_dtype
from esm2_composer.kernels.attention import attend_backward, attend_forward
from esm2_composer.kernels.elementwise import add_norm, add_norm_backward, gelu, gelu_backward, sum_rows


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
    dtype = compute_dtype(x)
    update = torch.zeros_like(x, dtype=dtype) if update is None else update.to(dtype)
    parameters = [
        parameter
        for part in (layer.attention_norm, layer.qkv, layer.out, layer.ffn_norm, layer.fc1, layer.fc2)
        for parameter in (part.weight, part.bias)  # FSDP has tensors in the place of parameters
    ]
    settings = layer.num_heads, layer.attention_norm.eps, layer.qkv.product
    tables = tables.view(torch.float32)
    x, update = x.contiguous(), update.contiguous()
    return TritonLayer.apply(x, update, tables, cu_seqlens, max_seqlen, positions, settings, *parameters)


class TritonLayer(torch.autograd.Function):
    """See `compute`."""

    @staticmethod
    def forward(ctx, x, update, tables, cu_seqlens, max_seqlen, positions, settings, *parameters) -> tuple:
        heads, eps, product = settings
        w_norm1, b_norm1, w_qkv, b_qkv, w_out, b_out, w_norm2, b_norm2, w1, b1, w2, b2 = parameters
        with torch.cuda.device_of(x):  # Triton launches on the current one
            x, normed, mean1, rstd1 = add_norm(x, update, w_norm1, b_norm1, eps)
            qkv, kept_qkv = product.forward(normed, w_qkv, b_qkv)
            qkv = qkv.view(len(x), 3, heads, -1)
            mixed, lse = attend_forward(qkv, tables, cu_seqlens, max_seqlen)
            wanted, mixed_wanted = x, mixed.view(len(x), -1)
            if positions is not None:
                wanted, mixed_wanted = (each.index_select(0, positions) for each in (wanted, mixed_wanted))
            out, kept_out = product.forward(mixed_wanted, w_out, b_out)
            total, normed, mean2, rstd2 = add_norm(wanted, out, w_norm2, b_norm2, eps)
            hidden, kept1 = product.forward(normed, w1, b1)
            update, kept2 = product.forward(gelu(hidden), w2, b2)
        ctx.save_for_backward(
            qkv, tables, mixed, lse, cu_seqlens, positions, x, w_norm1, mean1, rstd1, total, w_norm2, mean2, rstd2,
            hidden, *kept_qkv, *kept_out, *kept1, *kept2,
        )  # fmt: skip
        ctx.max_seqlen, ctx.product = max_seqlen, product
        return total, update

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total, grad_update) -> tuple:
        (
            qkv, tables, mixed, lse, cu_seqlens, positions, x, w_norm1, mean1, rstd1, total, w_norm2, mean2, rstd2,
            hidden, *kept,
        ) = ctx.saved_tensors  # fmt: skip
        backward, each = ctx.product.backward, len(kept) // 4
        kept_qkv, kept_out, kept1, kept2 = (kept[i : i + each] for i in range(0, len(kept), each))
        grad_total, grad_update = grad_total.contiguous(), grad_update.contiguous()
        with torch.cuda.device_of(total):
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
            grad = attend_backward(grad, qkv, tables, mixed, lse, cu_seqlens, ctx.max_seqlen).flatten(1)
            grad_b_qkv = sum_rows(grad)
            grad, grad_w_qkv = backward(grad, *kept_qkv)
            grad_x, grad_update, *grads_norm1 = add_norm_backward(grad_total, grad, x, w_norm1, mean1, rstd1)
        parameters = (
            *grads_norm1, grad_w_qkv, grad_b_qkv, grad_w_out, grad_b_out,
            *grads_norm2, grad_w1, grad_b1, grad_w2, grad_b2,
        )  # fmt: skip
        return grad_x, grad_update, None, None, None, None, None, *parameters
