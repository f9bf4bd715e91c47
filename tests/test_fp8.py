"""fp8's products are torchao's, on a CPU; what they do to the loss is in test_precision.py."""

from __future__ import annotations

import pytest
import torch

from esm2_composer import fp8
from esm2_composer.errors import UserError
from esm2_composer.fp8 import TOLERANCE, product, product_error, use_fp8
from esm2_composer.model import ESM2, ESM2Config

SMALL = ESM2Config(1, 64, 4, 256)


@pytest.mark.parametrize("tokens", [32, 37])
def test_a_product_and_its_gradients_are_torchaos(tokens: int) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48)
    x, grad = (3 * torch.randn(tokens, size) for size in (64, 48))
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    weights = [p.detach().clone().requires_grad_() for p in (linear.weight, linear.bias)]
    out = product(ours, *weights)
    out.backward(grad)
    holder = torch.nn.Sequential(linear)
    convert_to_float8_training(holder, config=Float8LinearConfig(pad_inner_dim=True, emulate=True))
    expected = holder(theirs)
    expected.backward(grad)
    pairs = [(out, expected), (ours.grad, theirs.grad)]
    pairs += [(mine.grad, p.grad) for mine, p in zip(weights, holder[0].parameters(), strict=True)]
    for got, want in pairs:
        assert (got - want).norm() <= 1e-3 * want.norm()
    exact = torch.nn.functional.linear(x, *weights)
    assert (out - exact).norm() > 1e-2 * exact.norm()  # it does round


def test_products_under_autocast_are_bf16_and_leave_weights_gradients_in_fp32() -> None:
    weight, bias = torch.randn(32, 16, requires_grad=True), torch.zeros(32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = product(torch.randn(5, 16), weight, bias)
    out.sum().backward()
    assert (out.dtype, weight.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_they_are_what_torch_asks_of_an_operator() -> None:
    x, weight, bias = (torch.randn(size, requires_grad=True) for size in ((21, 32), (48, 32), (48,)))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.esm2_composer.fp8_product, (x, weight, bias), test_utils=tests)


@pytest.mark.parametrize("which", ["out", "gradients"])
def test_a_device_whose_products_are_off_is_found_and_refused(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert product_error(64, 256, "cpu") < TOLERANCE
    multiply, calls = fp8._multiply, []

    def wrong(*arguments):
        calls.append(arguments)
        # Of three products on the device and three beside it, the first is the output.
        off = len(calls) == 1 if which == "out" else len(calls) == 3
        return multiply(*arguments) * (1.02 if off else 1)

    monkeypatch.setattr(fp8, "_multiply", wrong)
    assert product_error(64, 256, "cpu") > TOLERANCE
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(fp8, "product_error", lambda *_: float("nan"))
    with pytest.raises(UserError, match="fp8: products on NVIDIA H100 are off by nan"):
        use_fp8(ESM2(SMALL))


@pytest.mark.gpu
@pytest.mark.parametrize("k", [320, 1280, 5120])
def test_on_a_gpu_products_are_those_of_the_cpu(k: int) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 here")
    assert product_error(k, 4 * k, "cuda") < TOLERANCE
    assert product_error(4 * k, k, "cuda") < TOLERANCE
