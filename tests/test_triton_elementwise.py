"""Sums with norm, and GELU, in Triton equal torch's in float64, forward and backward, and so do layers on them.

Without a GPU Triton interprets them, one operation at a time, which a process must ask for before it imports them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernels import compile_for

from esm2_composer.attention import TOLERANCE

SHAPES = [(1, 48), (33, 320), (129, 64), (300, 1280)]  # around the 32 and 128 rows that a program adds up


def largest_errors(tokens: int, columns: int, stream: torch.dtype, dtype: torch.dtype, device: str) -> list[float]:
    """Relative: of the sum, its norm, and their gradients; of GELU and its gradients."""
    from esm2_composer.triton_elementwise import add_norm, gelu

    generator = torch.Generator().manual_seed(tokens)

    def draw(kind: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, kind).requires_grad_()

    x, update, hidden = draw(stream, tokens, columns), draw(dtype, tokens, columns), draw(dtype, tokens, columns)
    weight, bias = draw(torch.float32, columns), draw(torch.float32, columns)
    given = x, update, weight, bias, hidden
    total, normed, *_ = add_norm(x, update, weight, bias, 1e-5)
    activated = gelu(hidden, bias)
    assert (total.dtype, normed.dtype, activated.dtype) == (stream, dtype, dtype)
    exact = [one.detach().cpu().double().requires_grad_() for one in given]
    summed = exact[0] + exact[1]
    # The hidden numbers have the bias in them already, but its gradient is what theirs sums up to.
    theirs = summed, F.layer_norm(summed, (columns,), *exact[2:4]), F.gelu(exact[4] + exact[3] - exact[3].detach())
    ours = total, normed, activated
    weights = [torch.randn(total.shape, generator=generator) for _ in ours]
    sum((out.float() * w.to(device)).sum() for out, w in zip(ours, weights, strict=True)).backward()
    sum((out * w).sum() for out, w in zip(theirs, weights, strict=True)).backward()
    pairs = [*zip(ours, theirs, strict=True)] + [
        (one.grad, want.grad) for one, want in zip(given, exact, strict=True)
    ]
    return [((got.cpu().double() - want).norm() / want.norm()).item() for got, want in pairs]


def interpreted(code: str) -> str:
    here = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{here}:{here.parent}"}
    command = [sys.executable, "-c", f"import test_triton_elementwise as t; t.{code}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_interpreted_they_are_exact() -> None:
    rows = [[float(error) for error in line.split()] for line in interpreted("print_errors()").splitlines()]
    assert len(rows) == 3 * len(SHAPES)
    assert max(map(max, rows[::3])) < 1e-6  # fp32
    assert max(map(max, rows[1::3])) < 2e-3  # an fp32 stream, else fp16; the interpreter has no bf16
    assert max(map(max, rows[2::3])) < 2e-3  # all in fp16


def print_errors() -> None:
    full, half = torch.float32, torch.float16
    for shape in SHAPES:
        for stream, dtype in ((full, full), (full, half), (half, half)):
            print(*largest_errors(*shape, stream, dtype, "cpu"))


def test_interpreted_a_model_on_them_trains_as_on_torchs_and_compiles_without_a_break() -> None:
    lines = interpreted("compare_models()").splitlines()
    assert [line.split()[0] for line in lines] == ["eager", "compiled"]
    for line in lines:
        assert max(map(float, line.split()[1:3])) < 3e-6
    assert lines[1].split()[3:] == ["3", "graphs,", "0", "breaks"]


def compare_models() -> None:
    from esm2_composer import model as module
    from esm2_composer import triton_attention, triton_elementwise
    from esm2_composer.attention import Attention
    from esm2_composer.model import ESM2, ESM2Config

    def net(**compiled) -> ESM2:
        torch.manual_seed(0)
        made = ESM2(ESM2Config(2, 32, 2, 64))
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        if compiled:
            made.compile_layers(**compiled)
        return made

    def train(net: ESM2) -> tuple[torch.Tensor, list[torch.Tensor]]:
        net.zero_grad()
        for lengths in ([5, 60], [33], [40, 40, 40]):  # gradients add up; below 33 tokens torch 2.11 compiles anew
            tokens = torch.arange(sum(lengths)) % 20 + 4
            logits = net(tokens, F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int(), max(lengths))
            F.cross_entropy(logits, tokens).backward()
        return logits.detach(), [p.grad.clone() for p in net.parameters() if p.grad is not None]

    assert torch.ops.esm2_composer.gelu.default == triton_elementwise.gelu._opoverload
    logits, grads = train(net())
    module.select_attention = lambda *_: Attention("triton", triton_attention.attend)
    for name, one in (("eager", net()), ("compiled", net(backend="aot_eager"))):
        got, ours = train(one)
        error = max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, grads, strict=True))
        counts = torch._dynamo.utils.counters
        print(name, ((got - logits).norm() / logits.norm()).item(), error, counts["stats"]["unique_graphs"],
              "graphs,", sum(counts["graph_break"].values()), "breaks")  # fmt: skip


@pytest.mark.parametrize("change", [lambda x: 1.03 * x, lambda x: x.detach() + 0 * x, lambda x: x / 0])
@pytest.mark.parametrize("which", ["add_norm", "gelu"])
def test_their_check_sees_rounding_only_where_they_are_right(which, change, monkeypatch) -> None:
    """torch's own in their place, and wrong ones."""
    from esm2_composer import triton_elementwise as module

    def add_norm(x, update, weight, bias, eps):
        total = x + update
        normed = F.layer_norm(total.float(), weight.shape, weight.float(), bias.float(), eps)
        return total, normed.to(update.dtype), None, None

    monkeypatch.setattr(module, "add_norm", add_norm)
    monkeypatch.setattr(module, "gelu", lambda hidden, bias: F.gelu(hidden + (bias - bias.detach()).to(hidden)))
    assert module.elementwise_error(torch.bfloat16, 320, "cpu") < TOLERANCE
    right = getattr(module, which)

    def wrong(*given):
        out = right(*given)
        return (out[0], change(out[1]), *out[2:]) if isinstance(out, tuple) else change(out)

    monkeypatch.setattr(module, which, wrong)
    assert not module.elementwise_error(torch.bfloat16, 320, "cpu") < TOLERANCE


@pytest.mark.parametrize(
    ("columns", "stream"), [(320, "*fp32"), (5120, "*fp32"), (5120, "*bf16"), (16384, "*fp32")]
)
@pytest.mark.parametrize("kernel", ["_add_norm", "_add_norm_backward", "_gelu", "_gelu_backward"])
def test_they_compile_for_gpus_to_wide_loads(kernel: str, columns: int, stream: str) -> None:
    """For an A100 and an H100, neither of which this takes."""
    from esm2_composer import triton_elementwise as module

    function, width = getattr(module, kernel), module._width(columns)
    types = dict.fromkeys(("x", "total", "grad_total", "grad_x", "weight", "bias"), stream)
    types |= dict.fromkeys(("mean", "rstd", "sums", "sums_weight", "sums_bias"), "*fp32") | {"eps": "fp32"}
    types |= dict.fromkeys(("tokens", "numbers"), "i32")
    values = {
        "D": columns,
        "F": columns,
        "WIDE": width["WIDE"],
        "BOTH": stream == "*fp32",
        "NUMBERS": module.NUMBERS,
    }
    values |= {"ROWS": module.GELU_ROWS, "COLUMNS": module.GELU_COLUMNS}
    values["STAGES"] = module._stages(columns, 4 if stream == "*fp32" else 2)
    values["SUMMED"] = module.GELU_SUMMED if "gelu" in kernel else module.NORM_ROWS
    warps = module.WARPS if "gelu" in kernel else width["num_warps"]
    for capability in (80, 90):
        made = compile_for(capability, function, types, values, warps)
        assert "ld.global.v4.b32" in made.asm["ptx"] or "ld.global.v4.u32" in made.asm["ptx"]
        assert made.metadata.shared <= 99 * 1024  # what an L40S has


def test_rows_may_be_padded_or_transposed() -> None:
    """As a compiler may leave them."""
    assert float(interpreted("print_strided_error()")) < 1e-6


def print_strided_error() -> None:
    from esm2_composer.triton_elementwise import add_norm, gelu

    wide, weight = torch.randn(48, 64), torch.ones(48)
    for x in (wide[:, :48], torch.randn(48, 40).t()):
        x = x.detach().requires_grad_()
        out = add_norm(x, x, weight, 0 * weight, 1e-5)[1] + gelu(x, weight)
        (got,) = torch.autograd.grad((out**2).sum(), x)
        exact = F.layer_norm(2 * x, (48,)) + F.gelu(x)
        (want,) = torch.autograd.grad((exact**2).sum(), x)
        errors = [(out - exact).norm() / exact.norm(), (got - want).norm() / want.norm()]
        assert max(errors) < 1e-6
    print(max(errors).item())


@pytest.mark.gpu
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [320, 480, 640, 1280, 2560, 5120])
def test_on_a_gpu_they_are_exact_within_their_type(columns: int, stream: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert max(largest_errors(1000, columns, stream, torch.bfloat16, "cuda")) < 1e-2


@pytest.mark.gpu
def test_on_a_gpu_they_are_the_same_to_the_last_bit_every_time() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    first, second = (largest_errors(5000, 1280, torch.float32, torch.bfloat16, "cuda") for _ in range(2))
    assert first == second
