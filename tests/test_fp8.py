"""fp8's products are torchao's, on a CPU; what they do to the loss is in test_precision.py."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from esm2_composer import fp8
from esm2_composer.errors import UserError
from esm2_composer.fp8 import E4M3, E5M2, FP8, TOLERANCE, product, product_error, use_fp8
from esm2_composer.model import ESM2, ESM2Config

SMALL = ESM2Config(2, 64, 4, 256)


def plain_and_compiled(config: ESM2Config) -> list[ESM2]:
    """Two models in fp8 with the same weights."""
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(ESM2(config))
        use_fp8(nets[-1])
    nets[1].compile_layers(backend="aot_eager")
    return nets


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
def test_products_that_are_off_are_found(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert product_error(64, 256, "cpu") < TOLERANCE
    multiply, calls = fp8._multiply, []

    def wrong(*arguments):
        calls.append(arguments)
        # Of three products on the device and three beside it, the first is the output.
        off = len(calls) == 1 if which == "out" else len(calls) == 3
        return multiply(*arguments) * (1.02 if off else 1)

    monkeypatch.setattr(fp8, "_multiply", wrong)
    assert product_error(64, 256, "cpu") > TOLERANCE


def fails(*_: object) -> float:
    raise RuntimeError("no\nkernel")


@pytest.mark.parametrize(
    ("capability", "lack", "check", "words"),
    [
        ((8, 0), None, fails, "fp8: NVIDIA X has no fp8 products that will do"),
        ((8, 9), None, fails, "fp8: NVIDIA X has no fp8 products that will do; an H100 or newer has"),
        ((9, 0), "a C compiler", fails, "fp8: a C compiler is missing"),
        ((9, 0), None, fails, r"fp8: products on NVIDIA X fail \(RuntimeError: no kernel\)"),
        ((9, 0), None, lambda *_: float("nan"), "fp8: products on NVIDIA X are off by nan"),
        ((9, 0), None, lambda *_: 1e-3, None),
    ],
)
def test_a_gpu_that_cannot_is_one_line(capability, lack, check, words, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
    monkeypatch.setattr(fp8, "missing_for_triton", lambda: lack)
    monkeypatch.setattr(fp8, "product_error", check)
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
        use_fp8(ESM2(SMALL))


def test_compiled_layers_compute_under_autocast_what_plain_ones_do() -> None:
    torch._dynamo.reset()
    nets = plain_and_compiled(SMALL)
    tokens, cu_seqlens = torch.randint(4, 24, (37,)), torch.tensor([0, 20, 37], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        plain, compiled = (net(tokens, cu_seqlens, 20) for net in nets)
    assert torch.equal(plain, compiled)


@pytest.mark.parametrize("tokens", [1, 37, 62_000])
def test_a_gpus_products_are_asked_for_as_torch_wants_them(tokens: int) -> None:
    """Layouts and multiples of 16 are looked at where tensors are faked."""
    with FakeTensorMode():

        def fake(kind: torch.dtype, *size: int) -> torch.Tensor:
            return torch.empty(size, dtype=kind, device="cuda")

        k, n, filled = 64, 256, (tokens + 15) // 16 * 16
        scale = fake(torch.float32)
        out = fp8._multiply(
            fake(E4M3, tokens, k), fake(E4M3, n, k), scale, scale, torch.bfloat16, fake(torch.float32, n)
        )
        grad_x = fp8._multiply(fake(E5M2, tokens, n), fake(E4M3, k, n), scale, scale, torch.bfloat16)
        grad_weight = fp8._multiply(fake(E5M2, n, filled), fake(E4M3, k, filled), scale, scale, torch.bfloat16)
    assert [x.shape for x in (out, grad_x, grad_weight)] == [(tokens, n), (tokens, k), (n, k)]
    assert {x.dtype for x in (out, grad_x, grad_weight)} == {torch.bfloat16}


def test_fp8_is_for_the_layers_products_and_leaves_names_and_compiling_as_they_are() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, net = ESM2(SMALL), ESM2(SMALL)
    use_fp8(net)
    assert list(net.state_dict()) == list(plain.state_dict())
    linear = {name: module for name, module in net.named_modules() if isinstance(module, torch.nn.Linear)}
    others = {name for name, module in linear.items() if getattr(module, "product", None) is not FP8}
    assert others == {"head.dense", "contact_head"}
    net.compile_layers(backend="aot_eager")
    for tokens in (37, 50, 61):  # no multiple of 16
        cu_seqlens = torch.tensor([0, 20, tokens], dtype=torch.int32)
        net(torch.randint(4, 24, (tokens,)), cu_seqlens, tokens - 20).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    assert not torch._dynamo.utils.counters["graph_break"]


def test_other_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="multiples of 16"):
        use_fp8(ESM2(ESM2Config(1, 72, 3, 288)))


@pytest.mark.gpu
@pytest.mark.parametrize("k", [320, 1280, 5120])
def test_on_a_gpu_products_are_those_of_the_cpu(k: int) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no fp8 here")
    assert product_error(k, 4 * k, "cuda") < TOLERANCE
    assert product_error(4 * k, k, "cuda") < TOLERANCE
