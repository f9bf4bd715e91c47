"""Bidirectional attention over sequences laid end to end: one function, several kernels.

A flat batch holds T tokens of B sequences; sequence b is the tokens cu_seqlens[b] to cu_seqlens[b+1]. No
kernel here computes padding, and no token sees another sequence.

    cpu     a loop over sequences around torch's CPU flash attention; any device, any dtype: the reference
    torch   FlashAttention-2's variable-length kernel inside torch: its public function where there is one
            (from 2.11), the operator behind it before; CUDA, fp16 or bf16
    flash   the flash-attn package, version 3 (`flash_attn_interface`) or else 2; CUDA, fp16 or bf16

On a CUDA device `auto` takes version 3 of the package where it is there and pays, on Hopper GPUs with heads of at
least 64 (it computes smaller ones as 64), else `torch`; `cpu` where q, k and v are neither fp16 nor bf16, and on
other devices. GPUs older than Ampere have none of these kernels.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F

log = logging.getLogger(__name__)

# q, k, v (T, heads, head_dim), cu_seqlens int32 (B+1,), longest sequence -> (T, heads, head_dim)
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


@functools.cache
def select_attention(backend: str, device_type: str, head_size: int) -> Attention:
    """The attention function for `backend` on a device of type "cpu" or "cuda"; logged once.

    Raises ValueError if the backend is unknown or cannot run there, naming those that can.
    """
    kernels = {"cpu": _per_sequence}
    best = "cpu"
    # Without a GPU to ask, as where a test pretends to have one, it is taken for an Ampere.
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0)
    if device_type == "cuda" and capability >= (8, 0):
        kernels["torch"] = _torch_varlen_function() or _torch_varlen_operator
        best = "torch"
        version, function = _flash_package()
        if function is not None:
            kernels["flash"] = function
            best = "flash" if version == 3 and capability[0] == 9 and head_size >= 64 else best
    chosen = best if backend == "auto" else backend
    if chosen not in kernels:
        raise ValueError(
            f"attention '{backend}' is not available on {device_type}; available here: auto, {', '.join(kernels)}"
        )
    log.info("attention on %s: %s", device_type, chosen)
    kernel = kernels[chosen]
    return kernel if backend != "auto" or chosen == "cpu" else _or_per_sequence(kernel)


def _or_per_sequence(kernel: Attention) -> Attention:
    """`kernel` for the 16-bit types it takes, the reference for others."""

    def attention(q, k, v, cu_seqlens, max_seqlen):
        function = kernel if q.dtype in (torch.float16, torch.bfloat16) else _per_sequence
        return function(q, k, v, cu_seqlens, max_seqlen)

    return attention


def _per_sequence(q, k, v, cu_seqlens, max_seqlen):
    lengths = cu_seqlens.diff().tolist()
    outputs = []
    # One split has one backward; a slice a sequence would each fill a gradient of the whole batch.
    for one in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        # torch's own function takes (batch, heads, length, head_dim)
        batched = (x.transpose(0, 1).unsqueeze(0) for x in one)
        outputs.append(F.scaled_dot_product_attention(*batched).squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def _torch_varlen_function() -> Attention | None:
    """torch's public function, or None where it is absent or has the signature of 2.10, without a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if "window_size" not in inspect.signature(varlen_attn).parameters:
        return None
    return lambda q, k, v, cu_seqlens, max_seqlen: varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    )


def _torch_varlen_operator(q, k, v, cu_seqlens, max_seqlen):
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, False, False
    )[0]


def _flash_package() -> tuple[int, Attention | None]:
    """The version of the flash-attn package that can be imported here, and its function; or 0 and None."""
    for version, name in ((3, "flash_attn_interface"), (2, "flash_attn")):
        try:
            function = importlib.import_module(name).flash_attn_varlen_func
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError) as error:  # as one built for another torch
            log.warning("%s cannot be imported: %s", name, error)
            continue
        return version, functools.partial(_flash_varlen, function)
    return 0, None


def _flash_varlen(function: Callable, q, k, v, cu_seqlens, max_seqlen):
    out = function(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return out[0] if isinstance(out, tuple) else out
