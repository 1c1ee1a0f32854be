"""ops.quantize and ops.dequantize in int8: bitsandbytes' own bytes, and what they leave undefined."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from devices import fetch, put
from pissa import ops
from pissa.ops._load import FORCED

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def codes_of(weight: ops.QuantizedWeight) -> Tensor:
    return weight.codes.view(torch.int8).view(weight.shape)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 300),
    dtype=st.sampled_from(FLOATS),
    scale=st.sampled_from([1e-3, 1.0, 1e2]),
    grid=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_bytes_are_those_of_bitsandbytes(
    rows: int, cols: int, dtype: torch.dtype, scale: float, grid: bool, seed: int
) -> None:
    pytest.importorskip("bitsandbytes")
    bnb = torch.ops.bitsandbytes
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    if grid:  # elements half-way between codes
        weight = (8 * weight).round() + 0.5
        weight[:, 0] = -127
    weight = (weight * scale).to(dtype)
    quantized = fetch(ops.quantize(put(weight), "int8"))
    codes, scales, _ = bnb.int8_vectorwise_quant(weight)
    assert torch.equal(codes_of(quantized), codes)
    assert torch.equal(quantized.absmax, scales)
    exact = bnb.int8_vectorwise_dequant(codes, scales)
    for out in FLOATS:
        assert torch.equal(fetch(ops.dequantize(put(quantized), out)), exact.to(out))


def test_rows_of_zeros_and_of_nearly_zeros_have_codes_of_zero() -> None:
    """Where 1 / scale * 127 is not finite, bitsandbytes makes integers of Inf and NaN."""
    weight = torch.randn(4, 50)
    weight[1] = 0
    weight[2] = -0.0
    weight[3] = -1e-38
    quantized = fetch(ops.quantize(put(weight), "int8"))
    assert not codes_of(quantized)[1:].any()
    assert torch.equal(quantized.absmax, weight.abs().amax(1))
    assert torch.equal(fetch(ops.dequantize(put(quantized)))[1:], torch.zeros(3, 50))


@pytest.mark.parametrize("options", [{"blocksize": 64}, {"blocksize": 50}, {"double_quant": True}])
def test_options_that_it_has_not_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(options))}: got .*int8"):
        ops.quantize(put(torch.ones(4, 50)), "int8", **options)


@pytest.mark.skipif(FORCED, reason="about the kernels")
def test_the_compiled_op_refuses_blocks_that_are_no_rows_and_nested_scales() -> None:
    weight = put(torch.zeros(20, dtype=torch.uint8))
    scales, one = put(torch.ones(4)), put(torch.ones(()))
    with pytest.raises((RuntimeError, ValueError), match="a row"):
        torch.ops.pissa.dequantize(weight, scales, None, None, "int8", 64, 4, 5, torch.float32)
    with pytest.raises((RuntimeError, ValueError), match="no nested scales"):
        torch.ops.pissa.dequantize(weight, scales.byte(), scales[:1], one, "int8", 5, 4, 5, torch.float32)
