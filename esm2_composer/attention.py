"""Bidirectional attention over sequences laid end to end: several kernels, chosen in one place.

A flat batch holds T tokens of B sequences; sequence b is the tokens cu_seqlens[b] to cu_seqlens[b+1]. No
kernel here computes padding, and no token sees another sequence.

    cpu     a loop over sequences around torch's CPU flash attention; any device, any dtype: the reference
    triton  ours (`kernels.attention`), which rotates too, and with it the rest of a layer (`kernels.layer`);
            CUDA, fp16 or bf16, and a C compiler
    torch   FlashAttention-2's variable-length kernel inside torch: its public function where there is one
            (from 2.11), the operator behind it before; CUDA, fp16 or bf16
    flash   the flash-attn package, version 3 (`flash_attn_interface`) or else 2; CUDA, fp16 or bf16

`auto` takes `triton` on a CUDA device if q, k and v are fp16 or bf16, `torch` where Triton does not work, or with
heads of more than 64 on GPUs other than Hopper and B200, and `cpu` elsewhere. GPUs older than Ampere have none of
these kernels.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from esm2_composer.kernels.checks import as_in_training, failure_line, missing_for_triton, relative_error

log = logging.getLogger(__name__)

# q, k, v (T, heads, head_dim), cu_seqlens int32 (B+1,), longest sequence -> (T, heads, head_dim)
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Attention:
    """A backend: a kernel or, of `triton`, what computes a whole layer (`kernels.layer.compute`)."""

    name: str
    kernel: Kernel | None = None
    layer: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What a product of x comes out as: autocast's type, where that is on."""
    device_type = x.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


@functools.cache
def select_attention(backend: str, device_type: str, dtype: torch.dtype, heads: int, head_size: int) -> Attention:
    """The attention of `backend` on a device of type "cpu" or "cuda", for q, k and v of `dtype`; logged once.

    Raises ValueError if the backend is unknown or cannot run there, naming others that can.
    """
    found = [Attention("cpu", _per_sequence)]  # the last is the best
    # Without a GPU to query, as when a test pretends to have one, assume Ampere.
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0)
    if device_type == "cuda" and capability >= (8, 0) and dtype in (torch.float16, torch.bfloat16):
        if backend == "flash" and (function := _flash_package()) is not None:
            found.append(Attention("flash", function))
        found.append(Attention("torch", _torch_varlen_function() or _torch_varlen_operator))
        spills = capability[0] not in (9, 10) and head_size > 64  # too few registers, but on Hopper and B200
        wanted = backend == "triton" or (backend == "auto" and not spills)
        if wanted and (attention := _triton(dtype, heads, head_size)) is not None:
            found.append(attention)
    chosen = [attention for attention in found if backend in ("auto", attention.name)]
    if not chosen:
        where = f"{device_type} in {dtype}".replace("torch.", "")
        names = ", ".join(attention.name for attention in found)
        raise ValueError(f"attention '{backend}' is not available on {where}; available here: auto, {names}")
    _tell(device_type, chosen[-1].name)
    return chosen[-1]


@functools.cache
def _tell(device_type: str, name: str) -> None:
    log.info("attention on %s: %s", device_type, name)


def _per_sequence(q, k, v, cu_seqlens, max_seqlen):
    lengths = cu_seqlens.diff().tolist()
    outputs = []
    # One split has one backward; a slice per sequence would each fill a gradient of the whole batch.
    for one in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        # torch's own function takes (batch, heads, length, head_dim)
        batched = (x.transpose(0, 1).unsqueeze(0) for x in one)
        outputs.append(F.scaled_dot_product_attention(*batched).squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def _torch_varlen_function() -> Kernel | None:
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


def _flash_package() -> Kernel | None:
    """The function of the newest flash-attn package that can be imported here."""
    for name in ("flash_attn_interface", "flash_attn"):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError) as error:  # such as one built for another torch
            log.warning("%s cannot be imported: %s", name, error)
            continue
        if hasattr(module, "flash_attn_varlen_func"):  # version 4 has the same name, and a different module inside
            return functools.partial(_flash_varlen, module.flash_attn_varlen_func)
    return None


def _flash_varlen(function: Callable, q, k, v, cu_seqlens, max_seqlen):
    out = function(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return out[0] if isinstance(out, tuple) else out


def _triton(dtype: torch.dtype, heads: int, head_size: int) -> Attention | None:
    """None, and a line in the log, if it cannot be built, or computes something else on this GPU."""
    if lack := missing_for_triton():
        log.warning("attention: Triton cannot be used: %s is missing", lack)
        return None
    from esm2_composer.kernels import layer
    from esm2_composer.kernels.attention import attend
    from esm2_composer.kernels.elementwise import elementwise_error

    if torch.cuda.is_available():
        try:
            errors = (
                rotated_error(attend, dtype, heads, head_size, "cuda"),
                elementwise_error(dtype, heads * head_size, "cuda"),
            )
        except Exception as failure:  # compilers fail in many ways
            log.warning("attention: Triton cannot be used: %s", failure_line(failure))
            return None
        for error in errors:
            if not error < TOLERANCE:
                log.warning("attention: Triton cannot be used: a kernel of it is off by %.1e on this GPU", error)
                return None
    return Attention("triton", layer=layer.compute)


TOLERANCE = 1.5e-2  # bf16's rounding makes some 5e-3


def rotated_error(
    attend: Callable[..., torch.Tensor], dtype: torch.dtype, heads: int, head_size: int, device: str
) -> float:
    """The relative error of a kernel that rotates, as `kernels.attention.attend` does: the largest of its output's
    and of the gradients' of q, k and v; NaN if any is."""
    with as_in_training(device):
        draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
        lengths = torch.tensor([1, 64, 40, 150])
        tokens = int(lengths.sum())
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int().to(device)
        angles = 10 * draw(tokens, 1, head_size // 2)
        tables = torch.stack((angles.cos(), angles.sin())).to(device)
        qkv = draw(tokens, 3, heads, head_size).to(device, dtype)
        weights = draw(tokens, heads, head_size).to(device)
        ours, theirs = qkv.clone().requires_grad_(), qkv.float().clone().requires_grad_()
        out = attend(ours.clone(), tables, cu_seqlens, 150)
        q, k, v = theirs.unbind(1)
        exact = _per_sequence(rotate(q, *tables), rotate(k, *tables), v, cu_seqlens, 150)
        (got,) = torch.autograd.grad((out.float() * weights).sum(), ours)
        (want,) = torch.autograd.grad((exact * weights).sum(), theirs)
        return relative_error((out, *got.unbind(1)), (exact, *want.unbind(1)))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x (T, H, K) in the planes (i, i + K/2), computed in fp32, returned in x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
