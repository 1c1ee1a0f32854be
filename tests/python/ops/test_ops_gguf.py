"""The blocks of GGUF files in ops: elements bit for bit as gguf-py decodes them, products and gradients of the decoded
weight, and what is refused."""

from __future__ import annotations

import gguf
import numpy
import pytest
import torch
from gguf.quants import dequantize
from torch import Tensor

import one_weight
from bench.compare.gguf_blocks import random_blocks, weight_of
from devices import fetch, put
from pissa import ops
from pissa.ops.formats import FORMATS, READ

TYPES = {
    name: getattr(gguf.GGMLQuantizationType, name.removesuffix("_gguf").upper())
    for name, format in READ.items()
    if format.is_read_only
}
"""gguf-py's types, by the names of our formats."""

FORMAT = pytest.mark.parametrize("format", TYPES)


def decoded(blocks: numpy.ndarray, format: str) -> Tensor:
    with numpy.errstate(all="ignore"):
        return torch.from_numpy(dequantize(blocks, TYPES[format]))


def test_the_table_is_that_of_gguf() -> None:
    assert TYPES.keys() == READ.keys() - FORMATS.keys()
    for name, type in TYPES.items():
        assert gguf.GGML_QUANT_SIZES[type] == (READ[name].usual_blocksize, READ[name].block_bytes)


@FORMAT
def test_elements_are_those_of_gguf_bit_for_bit(format: str) -> None:
    """Random bytes: every code, and scales that are tiny, huge, infinite or NaN."""
    generator = numpy.random.default_rng(0)
    rows, columns = 64, 9 * READ[format].usual_blocksize
    blocks = generator.integers(0, 256, (rows, 9 * READ[format].block_bytes), dtype=numpy.uint8)
    expected = decoded(blocks, format)
    got = fetch(ops.dequantize(put(weight_of(blocks, format))))
    assert got.shape == (rows, columns)
    same = got.view(torch.int32) == expected.view(torch.int32)
    assert (same | (got.isnan() & expected.isnan())).all()


@FORMAT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(format: str, dtype: torch.dtype) -> None:
    blocks = random_blocks(format, 8, 512)
    got = fetch(ops.dequantize(put(weight_of(blocks, format)), dtype))
    assert torch.equal(got, decoded(blocks, format).to(dtype))


@FORMAT
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_products_and_gradients_are_those_of_the_decoded_weight(format: str, tokens: int) -> None:
    torch.manual_seed(0)
    blocks = random_blocks(format, 96, 768)
    weight, dense = put(weight_of(blocks, format)), put(decoded(blocks, format)).double()
    x = put(torch.randn(tokens, 768)).requires_grad_()
    a, b = (put(torch.randn(*shape)).requires_grad_() for shape in ((4, 768), (96, 4)))
    y, dy = ops.linear(x, weight, a=a, b=b, scaling=0.5), put(torch.randn(tokens, 96))
    y.backward(dy)
    exact = [part.detach().double().requires_grad_() for part in (x, a, b)]
    expected = exact[0] @ dense.mT + 0.5 * exact[0] @ exact[1].mT @ exact[2].mT
    expected.backward(dy.double())
    # gamma(n) of n products added up in float32, twice where factors come between
    size = dense.abs().norm() + exact[1].norm() * exact[2].norm()
    bound = (768 + 96 + 8) * 2.0**-24 * size * max(exact[0].norm(), dy.norm())
    assert (y.detach().double() - expected).norm() <= bound
    assert (x.grad.double() - exact[0].grad).norm() <= bound
    for got, gradient in ((a.grad, exact[1].grad), (b.grad, exact[2].grad)):
        factors = max(exact[1].norm(), exact[2].norm())
        assert (got.double() - gradient).norm() <= 900 * 2.0**-24 * exact[0].norm() * dy.norm() * factors


@FORMAT
def test_nothing_is_written_in_it(format: str) -> None:
    with pytest.raises(ValueError, match=f"format: got '{format}'"):
        ops.quantize(put(torch.ones(8, 256)), format)
    with pytest.raises(ValueError, match="form"):
        one_weight.split(put(torch.ones(8, 256)), 2, form=format)
    # where Python's checks are passed by
    with pytest.raises((RuntimeError, ValueError), match=f"format: got '{format}', which is read but not written"):
        torch.ops.pissa.quantize(put(torch.ones(8, 256)), format, READ[format].usual_blocksize, None)
