"""Every attention backend equals plain softmax attention within each sequence; the wrong one is refused."""

import contextlib
import importlib.machinery
import itertools
import sys
import sysconfig
import types

import pytest
import torch

from esm2_composer import attention
from esm2_composer.attention import TOLERANCE, rotate, rotated_error, select_attention

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


@pytest.fixture(autouse=True)
def nothing_chosen_yet():
    attention._tell.cache_clear()
    select_attention.cache_clear()


def select(backend: str, device: str, dtype: torch.dtype, heads: int = 4, head_size: int = 16):
    return select_attention.__wrapped__(backend, device, dtype, heads, head_size)


def kernel(backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """The kernel of a backend, taking rotated q, k and v."""
    found = select(backend, device, dtype)
    if found.kernel is not None:
        return found.kernel
    from esm2_composer.kernels.attention import attend

    def without_rotation(q, k, v, cu_seqlens, max_seqlen):
        tables = torch.stack((torch.ones(*q.shape[::2]), torch.zeros(*q.shape[::2])))[:, :, None, ::2]
        return attend(torch.stack((q, k, v), 1), tables.contiguous().to(q.device), cu_seqlens, max_seqlen)

    return without_rotation


@pytest.mark.parametrize("head_size", [16, 24, 32, 64, 128])
def test_cpu_attention_is_exact_forward_and_backward(head_size):
    *qkv, cu_seqlens = inputs(head_size, "cpu", torch.float32)
    check(kernel("cpu"), qkv, cu_seqlens, tolerance=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "triton", "torch", "flash", "cpu"])
@pytest.mark.parametrize("head_size", [16, 24, 32, 64, 128])
def test_gpu_kernels_equal_plain_attention_within_bf16(backend, head_size):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    try:
        attention = kernel(backend, "cuda", torch.bfloat16)
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


@pytest.mark.parametrize("backend", ["torch", "flash", "triton", "xformers"])
@pytest.mark.parametrize(("device", "kind"), [("cpu", "cpu in bfloat16"), ("cuda", "cuda in float32")])
def test_a_backend_that_cannot_run_here_is_refused_with_those_that_can(backend, device, kind):
    dtype = torch.bfloat16 if device == "cpu" else torch.float32
    with pytest.raises(ValueError, match=f"'{backend}' is not available on {kind}; available here: auto, cpu$"):
        select(backend, device, dtype)


def test_the_choice_is_logged_once(caplog):
    caplog.set_level("INFO", logger="esm2_composer.attention")
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        select_attention("auto", "cpu", dtype, 4, 16)
    assert caplog.messages == ["attention on cpu: cpu"]


def install(monkeypatch, name: str, **contents) -> None:
    """A module of that name, as far as importing goes."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def by_sequence(q, k, v, cu_q, cu_k, max_q, max_k):
    assert cu_q is cu_k
    assert max_q == max_k == max(LENGTHS)
    return kernel("cpu")(q, k, v, cu_q, max_q)


def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    raise AssertionError("its window is not to be had by keyword")


def of_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert (return_aux, scale, window_size) == (None, None, (-1, -1))
    return by_sequence(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


@pytest.mark.parametrize(("function", "taken"), [(of_2_10, False), (of_2_11, True), (None, False)])
def test_torchs_public_function_is_taken_where_it_has_the_right_signature(function, taken, monkeypatch):
    if function is None:
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)  # torch before 2.10
    else:
        install(monkeypatch, "torch.nn.attention.varlen", varlen_attn=function)
    found = attention._torch_varlen_function()
    assert (found is not None) == taken
    if taken:
        *qkv, cu_seqlens = inputs(16, "cpu", torch.float32)
        check(found, qkv, cu_seqlens, tolerance=1e-5)


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_interface"])
@pytest.mark.parametrize("with_sums", [False, True])
def test_both_versions_of_flash_attn_are_called_as_they_want(name, with_sums, monkeypatch):
    def function(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        out = by_sequence(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return (out, out.sum(-1)) if with_sums else out

    install(monkeypatch, name, flash_attn_varlen_func=function)
    *qkv, cu_seqlens = inputs(16, "cpu", torch.float32)
    check(kernel("flash", "cuda", torch.bfloat16), qkv, cu_seqlens, tolerance=1e-5)


def test_another_module_of_the_name_is_passed_over(monkeypatch):
    """flash-attn 4 is `flash_attn.cute`: importing `flash_attn` finds an empty package."""
    install(monkeypatch, "flash_attn")
    with pytest.raises(ValueError, match="available here: auto, cpu, torch"):
        kernel("flash", "cuda", torch.bfloat16)


def test_a_flash_attn_that_cannot_be_imported_is_told_and_not_taken(monkeypatch, tmp_path, caplog):
    (tmp_path / "flash_attn_interface.py").write_text("raise ImportError('undefined symbol: at::empty')")
    monkeypatch.syspath_prepend(tmp_path)
    kernel("torch", "cuda", torch.float16)  # does not ask for it
    with pytest.raises(
        ValueError, match="'flash' is not available on cuda in float16; available here: auto, cpu, t"
    ):
        kernel("flash", "cuda", torch.float16)
    assert caplog.messages == ["flash_attn_interface cannot be imported: undefined symbol: at::empty"]


@pytest.mark.parametrize("missing", [None, "compiler", "headers", "package"])
def test_auto_takes_triton_where_its_launchers_can_be_built(missing, monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO", logger="esm2_composer.attention")
    monkeypatch.setenv("CC", "cc")
    if missing == "compiler":
        monkeypatch.delenv("CC")
        monkeypatch.setenv("PATH", str(tmp_path))
    elif missing == "headers":
        monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    elif missing == "package":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = select("auto", "cuda", torch.bfloat16)
    what = {"compiler": "a C compiler", "headers": f"{tmp_path}/Python.h", "package": "the package triton"}
    if missing is None:
        assert found.name == "triton"
        assert found.layer is not None
        assert caplog.messages == ["attention on cuda: triton"]
    else:
        assert (found.name, found.layer) == ("torch", None)
        told = f"attention: Triton cannot be used: {what[missing]} is missing"
        assert caplog.messages == [told, "attention on cuda: torch"]


def rotating(change=lambda out: out):
    """A kernel that rotates, made of the reference."""

    def attend(qkv, tables, cu_seqlens, max_seqlen):
        q, k, v = qkv.float().unbind(1)
        out = kernel("cpu")(rotate(q, *tables), rotate(k, *tables), v, cu_seqlens, max_seqlen)
        return change(out).to(qkv.dtype)

    return attend


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("head_size", [8, 24, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_check_of_a_kernel_sees_rounding_only_where_it_is_right(dtype, head_size, mode):
    state = torch.get_rng_state()
    with mode(), torch.autocast("cpu", torch.bfloat16):  # wherever a model is first called
        error = rotated_error(rotating(), dtype, 2, head_size, "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert error < {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize(
    "change",
    [
        lambda out: 1.03 * out,
        lambda out: out.detach() + 0 * out,  # the output is right, the gradient nothing
        lambda out: out.roll(1, 0),
        lambda out: out / 0,
        lambda out: torch.where(torch.arange(len(out))[:, None, None] == 50, 0, out),  # one row of 255
    ],
)
def test_the_check_of_a_kernel_sees_what_is_wrong(change):
    assert not rotated_error(rotating(change), torch.bfloat16, 2, 16, "cpu") < TOLERANCE


@pytest.mark.parametrize(("rotated", "elementwise"), [(float("nan"), 0.0), (0.0, float("nan"))])
def test_a_kernel_that_computes_something_else_here_is_told_and_not_taken(
    rotated, elementwise, monkeypatch, caplog
):
    pretend_a_gpu(monkeypatch, (9, 0), rotated, elementwise)
    assert select("auto", "cuda", torch.bfloat16).name == "torch"
    assert caplog.messages == ["attention: Triton cannot be used: a kernel of it is off by nan on this GPU"]
    with pytest.raises(
        ValueError, match="'triton' is not available on cuda in bfloat16; available here: auto, cpu, t"
    ):
        select("triton", "cuda", torch.bfloat16)
    pretend_a_gpu(monkeypatch, (9, 0), 3e-3, 3e-3)
    assert select("auto", "cuda", torch.bfloat16).name == "triton"


def pretend_a_gpu(monkeypatch, capability, rotated=0.0, elementwise=0.0):
    """On which Triton's kernels are off by so much."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(attention, "rotated_error", lambda *_: rotated)
    monkeypatch.setattr("esm2_composer.kernels.elementwise.elementwise_error", lambda *_: elementwise)


def test_a_kernel_that_cannot_be_compiled_is_told_and_hinders_no_other(monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("PassManager::run failed")

    pretend_a_gpu(monkeypatch, (12, 0))
    monkeypatch.setattr(attention, "rotated_error", fail)
    assert select("auto", "cuda", torch.bfloat16).name == "torch"
    assert caplog.messages == ["attention: Triton cannot be used: RuntimeError: PassManager::run failed"]
    caplog.clear()
    assert select("torch", "cuda", torch.bfloat16).name == "torch"
    assert not caplog.messages


@pytest.mark.parametrize(
    ("capability", "head_size", "chosen"),
    [((8, 0), 64, "triton"), ((8, 9), 128, "torch"), ((9, 0), 128, "triton")],
)
def test_auto_takes_triton_where_it_does_not_spill(capability, head_size, chosen, monkeypatch):
    pretend_a_gpu(monkeypatch, capability)
    assert select("auto", "cuda", torch.bfloat16, 40, head_size).name == chosen
    assert select("triton", "cuda", torch.bfloat16, 40, head_size).name == "triton"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_auto_takes_the_reference_where_gpus_have_no_kernel(dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert select("auto", "cuda", dtype).name == "cpu"
    with pytest.raises(ValueError, match=r"'torch' is not available on cuda in .*; available here: auto, cpu"):
        select("torch", "cuda", dtype)
    pretend_a_gpu(monkeypatch, (8, 0))
    expected = "cpu" if dtype == torch.float32 else "triton"
    assert select("auto", "cuda", dtype).name == expected
