"""Products of integers: `int8=True` of ops.linear and ops.grouped_linear."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.compare.gguf_blocks import random_blocks, weight_of
from daily import each
from pissa import ops
from pissa.ops.formats import READ

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(not ops.build_info()["int8"], reason="this processor multiplies no bytes"),
]

OUT, IN, R = 192, 512, 4
FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "nf4-long": {"blocksize": 4096, "double_quant": False},
    "int8": {"format": "int8"},
    "mxfp4": {"format": "mxfp4"},
    "nvfp4": {"format": "nvfp4"},
    "int4": {"format": "int4"},
    "fp8": {"format": "fp8"},
}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(x: Tensor, weight: ops.QuantizedWeight, **options: Any) -> tuple[Tensor, ...]:
    """y and the gradients of x, a and b."""
    a, b = drawn(R, x.shape[-1], seed=2).requires_grad_(), drawn(weight.shape[0], R, seed=3).requires_grad_()
    x = x.clone().requires_grad_()
    y = ops.linear(x, weight, a=a, b=b, scaling=0.1, **options)
    dy = drawn(*y.shape, seed=4).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, (x, a, b), dy)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative to the norm."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", each(FORMATS, daily=("nf4", "mxfp4", "fp8")))
def test_close_to_products_of_floats_and_the_factors_gradients_the_same(format: str, dtype: torch.dtype) -> None:
    """A byte errs by a uniform half step, so by max / 127 / sqrt(12): of a Gaussian block of 256, whose largest element
    is about 3 sigma, by 0.7 % of sigma, of both operands by 1 %. Codes are spread more evenly than that."""
    weight = ops.quantize(drawn(OUT, IN, seed=0), **FORMATS[format])
    x = drawn(3, 15, IN, seed=1).to(dtype)
    y, dx, grad_a, grad_b = gradients(x, weight, int8=True)
    exact = gradients(x, weight)
    assert 1e-3 < error(y, exact[0]) < 0.02
    assert 1e-3 < error(dx, exact[1]) < 0.02
    assert torch.equal(grad_a, exact[2])
    assert torch.equal(grad_b, exact[3])


@pytest.mark.parametrize("format", [name for name, format in READ.items() if format.is_read_only])
def test_blocks_of_gguf(format: str) -> None:
    weight = weight_of(random_blocks(format, OUT, IN), format)
    x = drawn(45, IN, seed=1)
    found, exact = gradients(x, weight, int8=True), gradients(x, weight)
    assert error(found[0], exact[0]) < 0.02
    assert error(found[1], exact[1]) < 0.02


@pytest.mark.parametrize(("rows", "differs"), [(16, False), (17, True)])
def test_few_rows_are_multiplied_as_before(rows: int, differs: bool) -> None:
    weight, x = ops.quantize(drawn(OUT, IN, seed=0)), drawn(rows, IN, seed=1)
    pairs = zip(gradients(x, weight, int8=True)[:2], gradients(x, weight)[:2], strict=True)
    assert all(torch.equal(*pair) != differs for pair in pairs)


def test_a_group_has_the_bits_of_its_layers() -> None:
    weights = [ops.quantize(drawn(OUT, IN, seed=seed)) for seed in range(3)]
    x, offsets = drawn(60, IN, seed=5), [0, 20, 20, 60]
    a, b = [drawn(R, IN, seed=6)] * 3, [drawn(OUT, R, seed=7)] * 3
    x.requires_grad_()
    y = ops.grouped_linear(x, weights, offsets, a=a, b=b, int8=True)
    alone = [
        ops.linear(x[first:last], weights[i], a=a[i], b=b[i], int8=True)
        for i, (first, last) in enumerate(itertools.pairwise(offsets))
        if last > first
    ]
    assert torch.equal(y, torch.cat(alone))
    of_group, of_layers = (torch.autograd.grad(out.sum(), x)[0] for out in (y, torch.cat(alone)))
    assert torch.equal(of_group, of_layers)
