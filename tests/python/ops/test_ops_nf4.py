"""ops.quantize and ops.dequantize against the format's definition, and the numpy entry points of the compiled core.

Bytes made by bitsandbytes itself are compared in tests/cpp (golden vectors).
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cuda_stand_in import CudaStandIn
from devices import fetch, put
from pissa import ops
from torch_settings import threads

LEVELS = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip


def unpack(codes: Tensor, count: int) -> Tensor:
    return torch.stack([codes >> 4, codes & 15], dim=1).flatten()[:count].long()


def quantize(weight: Tensor, **options: object) -> ops.QuantizedWeight:
    """By the device that is tested; back on the CPU."""
    return fetch(ops.quantize(put(weight), **options))


def dequantize(weight: ops.QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    return fetch(ops.dequantize(put(weight), dtype))


def reference_codes(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Nearest level to element / absmax, block by block, in float64."""
    codes, absmax = [], []
    for block in weight.float().flatten().split(blocksize):
        absmax.append(block.abs().max())
        scaled = block.double() / absmax[-1].double().clamp(min=1e-38)
        codes.append((scaled[:, None] - LEVELS.double()).abs().argmin(dim=1))
    return torch.cat(codes), torch.stack(absmax)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 150),
    blocksize=st.sampled_from([32, 64, 128, 4096]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 1000),
)
def test_codes_are_the_nearest_levels(
    rows: int, cols: int, blocksize: int, dtype: torch.dtype, scale: float, seed: int
) -> None:
    weight = (torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    weight[0] = 0  # a block of zeros, or zeros in a block
    quantized = quantize(weight, blocksize=blocksize, double_quant=False)
    codes, absmax = reference_codes(weight, blocksize)
    got = unpack(quantized.codes, weight.numel())
    assert quantized.codes.shape == ((weight.numel() + 1) // 2,)
    torch.testing.assert_close(quantized.absmax, absmax, rtol=0, atol=2e-38)
    # Elements within rounding of a threshold may go either way: their scaled value is off by 2 units.
    scaled = weight.float().flatten().double() / absmax.double().repeat_interleave(blocksize)[: weight.numel()].clamp(
        min=1e-38
    )
    thresholds = (LEVELS[1:].double() + LEVELS[:-1].double()) / 2
    tie = (scaled[:, None] - thresholds).abs().min(dim=1).values < 4 * 2.0**-24
    assert torch.equal(got[~tie], codes[~tie])
    if weight.numel() % 2:
        assert quantized.codes[-1] & 15 == 7  # padded with the code of zero
    # Dequantised: level * absmax in float32, rounded once to the dtype asked for.
    for out in (torch.float32, torch.bfloat16, torch.float16):
        exact = LEVELS[got] * quantized.absmax.repeat_interleave(blocksize)[: weight.numel()]
        assert torch.equal(dequantize(quantized, out), exact.to(out).view(rows, cols))


def test_nested_scales_cost_little() -> None:
    weight = torch.randn(128, 300, generator=torch.Generator().manual_seed(0))
    plain, nested = quantize(weight, double_quant=False), quantize(weight)
    assert torch.equal(plain.codes, nested.codes)
    assert nested.absmax.dtype == torch.uint8
    assert nested.nested_absmax.shape == (3,)
    assert nested.offset.shape == ()
    error = (dequantize(nested) - dequantize(plain)).norm() / weight.norm()
    assert 0 < error < 0.01
    bits = sum(t.numel() * t.element_size() * 8 for t in nested[:4]) / weight.numel()
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=2e-3)


def test_layout_does_not_matter() -> None:
    weight = put(torch.randn(40, 70))
    for got, want in zip(ops.quantize(weight.mT), ops.quantize(weight.mT.contiguous()), strict=True):
        assert torch.equal(got, want) if isinstance(want, Tensor) else got == want


@pytest.mark.cpu_only
def test_threads_do_not_matter() -> None:
    weight = torch.randn(1500, 1500)  # 70314 scales: torch divides sums of more than 32768 among threads
    with threads(1):
        one = ops.quantize(weight, blocksize=32)
    with threads(3):
        three = ops.quantize(weight, blocksize=32)
    assert all(torch.equal(a, b) for a, b in zip(one[:4], three[:4], strict=True))
    assert one.offset == ops.quantize(weight, blocksize=32, double_quant=False).absmax.double().mean().float()


@pytest.mark.parametrize(
    ("weight", "options", "error", "name"),
    [
        (torch.ones(4, 4, dtype=torch.uint8), {}, TypeError, "weight"),
        (torch.ones(4), {}, ValueError, "weight"),
        (torch.full((4, 4), float("nan")), {}, ValueError, "weight"),
        (torch.ones(4, 4), {"blocksize": 63}, ValueError, "blocksize"),
        (torch.ones(4, 4), {"blocksize": 8192}, ValueError, "blocksize"),
        (torch.ones(4, 4), {"format": "int5"}, ValueError, "format"),
    ],
)
def test_quantize_refuses_by_name(
    weight: Tensor, options: dict[str, object], error: type[Exception], name: str
) -> None:
    with pytest.raises(error, match=rf"^{name}\b"):
        ops.quantize(put(weight), **options)


def test_dequantize_refuses_other_dtypes() -> None:
    with pytest.raises(TypeError, match=r"dtype: got torch.int8"):
        ops.dequantize(put(quantize(torch.ones(4, 4))), torch.int8)
    with pytest.raises(TypeError, match="weight: got Tensor; needed: QuantizedWeight"):
        ops.dequantize(torch.ones(4, 4))


@pytest.mark.parametrize("form", ["explicit", "nf4", "int8"])
@pytest.mark.parametrize(
    ("element", "value"),
    [(1.0, 1e38), (1.0, float("nan")), (1.0, float("inf")), (3e38, 3e35)],  # the last by the sum, not the product
)
def test_a_residual_that_overflows_is_refused(form: str, element: float, value: float) -> None:
    weight, a0, b0 = put((torch.full((64, 64), element), torch.full((4, 64), value), torch.randn(64, 4)))
    with pytest.raises(ValueError, match=r"^a0 of weight, b0 of weight: contain NaN or Inf, or their product"):
        ops.residual_many([weight], [a0], [b0], [1.0], names=["weight"], form=form)


def test_scales_whose_mean_overflows_are_refused() -> None:
    weight = put(torch.full((64, 64), 3e38))
    with pytest.raises(ValueError, match=r"^weight: the mean of its scales overflows"):
        ops.quantize(weight)
    quantised = ops.quantize(weight, double_quant=False)
    assert torch.equal(ops.dequantize(quantised), weight)


OPTIONS = [("nf4", {}), ("nf4", {"blocksize": 4096}), ("nf4", {"double_quant": False}), ("int8", {})]


@pytest.mark.cpu_only
@pytest.mark.parametrize(("format", "options"), OPTIONS)
@pytest.mark.parametrize("rows", [5, 2200])  # the larger has more scales than torch takes the mean of
def test_the_host_waits_once(format: str, options: dict[str, object], rows: int) -> None:
    weight = torch.randn(rows, 1000)
    with CudaStandIn() as gpu:
        there = gpu.put(weight)
        ops.quantize(there, format, **options)
        assert gpu.waits() == 1, gpu.reads


@pytest.mark.parametrize(("format", "options"), OPTIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rows", [5, 2200])
def test_what_is_not_finite_is_refused(format: str, options: dict[str, object], value: float, rows: int) -> None:
    """Wherever it is: in the first block, in a whole one, in the last, which may be short. Beside scales whose mean
    overflows too."""
    for weight in (torch.randn(rows, 1001), torch.full((rows, 1001), 3e38), torch.randn(rows, 1001).bfloat16()):
        for at in (0, 2010, weight.numel() - 1):
            bad = weight.clone()
            bad.view(-1)[at] = value
            with pytest.raises(ValueError, match=r"^weight: contains NaN or Inf; only finite weights can be"):
                ops.quantize(put(bad), format, **options)
