"""Every attention backend equals plain softmax attention within each sequence; the wrong one is refused."""

import itertools

import pytest
import torch

from esm2_composer.attention import select_attention

LENGTHS = [1, 5, 64, 130]


def plain_attention(q, k, v, cu_seqlens):
    """softmax(q k^T / sqrt(K)) v in float64, one sequence at a time."""
    out = []
    for start, stop in itertools.pairwise(cu_seqlens):
        q1, k1, v1 = (x[start:stop].double() for x in (q, k, v))
        scores = torch.einsum("qhd,khd->hqk", q1, k1) / q.shape[-1] ** 0.5
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v1))
    return torch.cat(out)


def inputs(head_size: int, device: str, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    qkv = torch.randn(3, tokens, 4, head_size, generator=generator)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return *qkv.to(device, dtype).unbind(0), cu_seqlens.to(device)


@pytest.mark.parametrize("head_size", [16, 24, 32, 64, 128])
def test_cpu_attention_is_exact_forward_and_backward(head_size):
    *qkv, cu_seqlens = inputs(head_size, "cpu", torch.float32)
    check(select_attention("cpu", "cpu"), qkv, cu_seqlens, tolerance=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "torch", "flash", "cpu"])
@pytest.mark.parametrize("head_size", [16, 24, 32, 64, 128])
def test_gpu_kernels_equal_plain_attention_within_bf16(backend, head_size):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    try:
        attention = select_attention(backend, "cuda")
    except ValueError as error:
        pytest.skip(str(error))
    *qkv, cu_seqlens = inputs(head_size, "cuda", torch.bfloat16)
    check(attention, qkv, cu_seqlens, tolerance=2e-2)


def check(attention, qkv, cu_seqlens, tolerance):
    """Output and gradients of `attention` within a relative `tolerance` of plain attention's."""
    ours = [x.detach().clone().requires_grad_() for x in qkv]
    theirs = [x.detach().clone().requires_grad_() for x in qkv]
    out, expected = attention(*ours, cu_seqlens, max(LENGTHS)), plain_attention(*theirs, cu_seqlens)
    assert out.shape == qkv[0].shape
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device)
    (out.float() * weights).sum().backward()
    (expected * weights).sum().backward()
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
    for got, want in pairs:
        assert (got.double() - want.double()).norm() <= tolerance * want.double().norm()


@pytest.mark.parametrize("backend", ["torch", "flash", "triton"])
def test_a_backend_that_cannot_run_here_is_refused_with_those_that_can(backend):
    with pytest.raises(ValueError, match=f"'{backend}' is not available on cpu; available here: auto, cpu"):
        select_attention(backend, "cpu")


def test_auto_runs_on_a_cpu():
    *qkv, cu_seqlens = inputs(16, "cpu", torch.float32)
    select_attention("auto", "cpu")(*qkv, cu_seqlens, max(LENGTHS))


def test_the_choice_is_logged_once(caplog):
    caplog.set_level("INFO", logger="esm2_composer.attention")
    select_attention.cache_clear()
    for _ in range(3):
        select_attention("auto", "cpu")
    assert caplog.messages == ["attention on cpu: cpu"]
