"""NF3 and NF2, codes and elements by their definition: other tests take an element from `ops.dequantize`."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from pissa import ops

formats = pytest.mark.parametrize("format", ["nf3", "nf2"])


def levels(bits: int) -> Tensor:
    """Quantiles of evenly spaced probabilities, half of them above zero, zero, and one fewer below."""
    most = 1 - (1 / (2**bits - 1) + 1 / 2**bits) / 4
    half = 2 ** (bits - 1)

    def quantiles(count: int) -> list[float]:
        return [NormalDist().inv_cdf(most + (0.5 - most) * i / count) for i in range(count)]

    found = torch.tensor([-q for q in quantiles(half - 1)] + [0.0, *reversed(quantiles(half))], dtype=torch.float64)
    return found / found.max()


def elements(weight: ops.QuantizedWeight) -> Tensor:
    """Of plain scales, in float64: codes one after the other, from the lowest bit of the first byte on."""
    bits = int(weight.format[-1])
    stream = torch.stack([weight.codes >> i & 1 for i in range(8)], dim=1).flatten()
    count = math.prod(weight.shape)
    codes = (stream[: count * bits].view(count, bits) << torch.arange(bits)).sum(1)
    scales = weight.absmax.double().repeat_interleave(weight.blocksize)[:count]
    return (levels(bits)[codes] * scales).view(weight.shape)


@pytest.mark.parametrize("shape", [(5, 64), (7, 27), (3, 200)])
@formats
def test_elements_and_codes(format: str, shape: tuple[int, int]) -> None:
    """Every element is the level nearest to the weight's. Blocks may cross rows, and the last one be short."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = ops.quantize(weight, format, blocksize=32, double_quant=False)
    assert found.codes.numel() == math.ceil(weight.numel() * int(format[-1]) / 8)
    expected = elements(found)
    torch.testing.assert_close(ops.dequantize(found).double(), expected, rtol=1e-6, atol=0)
    blocks = weight.flatten().split(32)
    assert torch.equal(found.absmax, torch.stack([block.abs().max() for block in blocks]))
    scales = found.absmax.double().repeat_interleave(32)[: weight.numel()].view(shape)
    distances = (scales[..., None] * levels(int(format[-1])) - weight[..., None].double()).abs().amin(-1)
    assert ((expected - weight).abs() <= distances + 1e-6 * scales).all()


@formats
def test_products_read_the_codes(format: str) -> None:
    """Forward and backward in the fused layer, for one token and for many, beside float64."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(48, 72, generator=generator)
    found = ops.quantize(weight, format, double_quant=False)
    dense = elements(found)
    a, b = torch.randn(4, 72, generator=generator), torch.randn(48, 4, generator=generator)
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, 72, generator=generator, requires_grad=True)
        y = ops.linear(x, found, a=a, b=b, scaling=0.5)
        full = dense + 0.5 * b.double() @ a.double()
        bound = 90 * 2**-24 * (x.detach().abs().double() @ (dense.abs() + 0.5 * b.abs().double() @ a.abs().double()).mT)
        assert ((y.double() - x.double() @ full.mT).abs() <= bound).all()
        dy = torch.randn(tokens, 48, generator=generator)
        (dx,) = torch.autograd.grad(y, x, dy)
        torch.testing.assert_close(dx.double(), dy.double() @ full, rtol=1e-5, atol=1e-4)
