"""The formats of released models in ops: codes as their libraries make them, and products that are those of the decoded
weight. Decoding is tested on what libraries have written, in base/test_released.py, and each code in tests/cpp."""

from __future__ import annotations

import pytest
import torch

import one_weight
from devices import fetch, put
from pissa import ops
from pissa.ops._quant import e4m3_values
from released_fixtures import read

FORMATS = ["mxfp4", "nvfp4", "int4", "fp8"]


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_codes_and_scales_are_those_of_compressed_tensors(format: str) -> None:
    expected = read(f"{format}-compressed")
    rows = slice(0, -16)  # the others have been replaced
    weight = fetch(ops.quantize(put(expected["dense"]), format))
    scales = expected["weight_scale"].view(torch.uint8)
    assert torch.equal(weight.codes.view_as(expected["weight_packed"])[rows], expected["weight_packed"][rows])
    assert torch.equal(weight.absmax.view_as(scales)[rows], scales[rows])
    if format == "nvfp4":
        assert torch.equal(
            weight.nested_absmax[:127], e4m3_values(torch.device("cpu"))[:127] / expected["weight_global_scale"]
        )


@pytest.mark.parametrize("group", [32, 128])
def test_int4_scales_are_those_of_compressed_tensors_and_codes_the_nearest(group: int) -> None:
    """compressed-tensors divides in bfloat16, whose quotients may lie on ties: no code of ours is further away."""
    expected = read(f"int4-compressed-{group}")
    dense = expected["dense"]
    weight = fetch(ops.quantize(put(dense), "int4", blocksize=group))
    scale = expected["weight_scale"]
    assert torch.equal(weight.absmax.view_as(scale)[:-16], scale[:-16])
    packed = expected["weight_packed"].view(torch.uint8)
    ours, theirs = (
        fetch(ops.dequantize(put(weight._replace(codes=codes.flatten())))) for codes in (weight.codes, packed)
    )
    differ = (ours - theirs)[:-16].abs() > 0
    assert differ.float().mean() < 0.02
    assert ((ours - dense)[:-16].abs() <= (theirs - dense)[:-16].abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_rows_are_those_of_torch(dtype: torch.dtype) -> None:
    dense = (torch.randn(40, 72) * torch.logspace(-2, 2, 40)[:, None]).to(dtype)
    weight = fetch(ops.quantize(put(dense), "fp8"))
    scale = dense.float().abs().amax(1) / 448
    codes = (dense.float() / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(weight.absmax, scale)
    assert torch.equal(weight.codes.view_as(codes), codes.view(torch.uint8))
    assert torch.equal(fetch(ops.dequantize(put(weight))), codes.float() * scale[:, None])


@pytest.mark.parametrize("format", FORMATS)
def test_alternations_lose_less(format: str) -> None:
    torch.manual_seed(0)
    dense = put(torch.randn(96, 256))
    lost = {}
    for iters in (1, 5):
        found = one_weight.split(dense, 16, form=format, quant_iters=iters)
        assert found.residual.format == format
        a, b = (found.a0, found.b0)
        lost[iters] = (dense - ops.dequantize(found.residual) - b @ a).norm().item()
    assert lost[5] < lost[1] < (dense - ops.dequantize(ops.quantize(dense, format))).norm().item() * 1.2


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(format: str, bad: float) -> None:
    dense = torch.ones(8, 128)
    dense[3, 5] = bad
    with pytest.raises(ValueError, match="weight"):
        ops.quantize(put(dense), format)


@pytest.mark.parametrize("format", FORMATS[:3])
def test_blocks_lie_within_rows(format: str) -> None:
    with pytest.raises(ValueError, match=f"{format}: got a weight of 120 columns; needed: a multiple of"):
        ops.quantize(put(torch.ones(8, 120)), format)


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zeros(format: str) -> None:
    dense = torch.randn(4, 128)
    dense[1:3] = 0
    assert torch.equal(fetch(ops.dequantize(ops.quantize(put(dense), format)))[1:3], torch.zeros(2, 128))
    assert torch.equal(fetch(ops.dequantize(ops.quantize(put(torch.zeros(4, 128)), format))), torch.zeros(4, 128))
