"""kernels/fp8.py: a matrix and its transpose are rounded alike, whatever the number of rows; interpreted here, and
compiled for a GPU that is not here."""

from __future__ import annotations

import re

import pytest
import torch
from kernels import interpreted, launches, wide_loads


def test_interpreted_they_are_exact() -> None:
    assert interpreted("test_kernels_fp8.check_rounding()") == "8 sizes and types\n"


def check_rounding() -> None:
    """On numbers that fp8 has, since the interpreter rounds others wrongly (it loses carries)."""
    from esm2_composer.kernels.fp8 import BLOCK, round_both

    generator, checked = torch.Generator().manual_seed(0), 0
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        for rows, columns in ((5, 16), (64, 128), (100, 144), (3, 16 * BLOCK)):
            bits = torch.randint(0, 256, (rows, columns), generator=generator).to(torch.uint8)
            numbers = bits.view(kind).float()
            numbers = torch.where(numbers.isfinite() & (numbers.abs() > 2**-6), numbers, 0.0)
            largest = torch.finfo(kind).max
            numbers[numbers.abs() == largest] = 0
            numbers[0, -1] = -largest  # neither the first nor the last that is looked at
            rounded, transposed, scale = round_both(numbers / 2**20, kind)
            assert scale == 2**-20
            assert torch.equal(rounded.float(), numbers)
            filled = (rows + 15) // 16 * 16
            assert transposed.shape == (columns, filled)
            assert torch.equal(transposed[:, :rows].float(), numbers.t())
            assert not transposed[:, rows:].float().any()
            checked += 1
    rounded, _, scale = round_both(torch.zeros(5, 16), torch.float8_e4m3fn)
    assert not rounded.float().any()
    assert scale.isfinite()
    strided = torch.full((16, 10), 3.5)[:, ::2].t()  # as a compiler may leave it
    assert torch.equal(round_both(strided, torch.float8_e4m3fn)[0].float(), torch.full((5, 16), 448.0))
    print(checked, "sizes and types")


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_they_compile_for_a_gpu(kind: torch.dtype) -> None:
    """For an H100: to loads and stores of 16 bytes, and the instruction that rounds. And threads exchange numbers
    before they round them: Triton 3.6 puts some that were rounded into wrong places."""
    from esm2_composer.kernels.fp8 import round_both

    x = torch.empty(300, 1280, dtype=torch.bfloat16, device="meta")
    largest, rounds = (launch.compile_for(90) for launch in launches(lambda: round_both(x, kind)))
    assert wide_loads(largest)
    assert wide_loads(rounds)
    stores = re.findall(r"st\.global\.\S+", rounds.asm["ptx"])
    assert set(stores) == {"st.global.v4.b32", "st.global.b32"}
    assert stores.count("st.global.b32") == 1  # of the scale
    assert f"cvt.rn.satfinite.{'e4m3x2' if kind == torch.float8_e4m3fn else 'e5m2x2'}.f32" in rounds.asm["ptx"]
    exchanged = re.findall(r"convert_layout.*", rounds.asm["ttgir"])
    assert exchanged
    assert not any("xf8" in line for line in exchanged)
    assert max(largest.metadata.shared, rounds.metadata.shared) <= 48 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("rows", [300, 512, 32768])
def test_on_a_gpu_they_are_exact(rows: int, kind: torch.dtype) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no fp8 here")
    from esm2_composer.kernels.fp8 import round_both

    x = torch.randn(rows, 1280, device="cuda").bfloat16()
    rounded, transposed, scale = round_both(x, kind)
    factor = torch.finfo(kind).max / x.abs().max().float()
    assert scale.item() == pytest.approx(1 / factor.item(), rel=1e-6)
    assert torch.equal(rounded.float(), (x.float() * factor).to(kind).float())
    assert torch.equal(transposed[:, :rows].float(), rounded.float().t())
    assert not transposed[:, rows:].float().any()
