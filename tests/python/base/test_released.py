"""Released weights: every layout as its own library writes it, decoded bit for bit as it decodes it."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from devices import fetch, put
from pissa import ops
from pissa.base.classes import adopt
from pissa.base.released_layouts import join_rows, released_linear, released_weight
from pissa.base.weights import CodedLinear
from released_fixtures import PATH, read

with safe_open(PATH, "pt") as _file:
    LAYOUTS = sorted({name.partition("/")[0] for name in _file.keys()})  # noqa: SIM118


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decodes_as_its_library_does(layout: str) -> None:
    parts = read(layout)
    expected = parts.pop("decoded")
    parts.pop("dense", None)
    weight = released_weight(parts)
    assert weight.format == layout.partition("-")[0]
    codes = next(part for name, part in parts.items() if name in ("weight", "weight_packed", "blocks"))
    assert weight.codes.data_ptr() == codes.data_ptr(), "codes are copied"
    decoded = fetch(ops.dequantize(put(weight), torch.bfloat16))
    zero = expected == 0  # of which ModelOpt drops the sign
    assert torch.equal(decoded == 0, zero)
    assert torch.equal(decoded.view(torch.int16)[~zero], expected.view(torch.int16)[~zero])
    assert torch.equal(fetch(ops.dequantize(put(weight))).bfloat16(), expected)


@pytest.mark.parametrize(("rows", "columns"), [(200, 300), (200, 64), (64, 300), (1, 1)])
def test_partial_tiles(rows: int, columns: int) -> None:
    codes = torch.arange(rows * columns, dtype=torch.int32).remainder(126).to(torch.uint8).view(rows, columns)
    scale = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5
    weight = released_weight({"weight": codes.view(torch.float8_e4m3fn), "weight_scale_inv": scale})
    expanded = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    expected = codes.view(torch.float8_e4m3fn).float() * expanded
    assert torch.equal(fetch(ops.dequantize(put(weight))), expected)


def bad(layout: str, **changes: Tensor | None) -> dict[str, Tensor]:
    parts = read(layout)
    for name in ("decoded", "dense"):
        parts.pop(name, None)
    return {name: part for name, part in (parts | changes).items() if part is not None}


def scaled(layout: str, value: int) -> Tensor:
    scale = read(layout)["weight_scale"].clone()
    scale.view(torch.uint8)[3, 2] = value
    return scale


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (bad("mxfp4-compressed", weight_scale=scaled("mxfp4-compressed", 255)), r"^weight_scale: a scale is NaN"),
        (bad("nvfp4-compressed", weight_scale=scaled("nvfp4-compressed", 127)), r"^weight_scale: a scale is NaN"),
        (bad("nvfp4-compressed", weight_global_scale=None), "needed in addition: one of weight_global_scale"),
        (
            bad("mxfp4-compressed", weight_scale=torch.zeros(32, 7, dtype=torch.uint8)),
            r"^weight_scale: .*needed: \[32, 8\]",
        ),
        (bad("mxfp4-compressed", weight_packed=torch.zeros(32, 24, dtype=torch.uint8)), "not a multiple of 32"),
        (bad("mxfp4-compressed", weight_scale=None), "needed are scales"),
        (bad("mxfp4-compressed", weight_scale=torch.ones(32, 8)), "got torch.float32; needed: uint8"),
        (bad("mxfp4-compressed", weight=torch.zeros(32, 128, dtype=torch.uint8)), "weight and weight_packed"),
        (bad("int4-compressed-32", weight_shape=torch.tensor([32, 128])), r"^weight_shape: got \[32, 128\]"),
        (bad("int4-compressed-32", weight_scale=torch.ones(32, 16).bfloat16()), "a scale for 16 elements; allowed: 32"),
        (bad("int4-compressed-32", weight_scale=torch.full((32, 8), torch.nan)), "NaN or infinite"),
        (bad("int4-compressed-32", weight_zero_point=torch.zeros(1)), "not symmetric"),
        (bad("int4-compressed-32", weight_g_idx=torch.zeros(1)), "in another order"),
        (
            bad("fp8-tiles", weight_scale_inv=torch.ones(3, 1)),
            r"^weight_scale_inv: got \[3, 1\] beside a weight \[256, 128\]",
        ),
        (bad("mxfp4-gpt-oss", blocks=torch.zeros(32, 128, dtype=torch.uint8)), r"^blocks: got \[32, 128\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(parts: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        released_weight(parts)


def test_a_module_of_transformers_in_fp8_keeps_its_bytes() -> None:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    parts = read("fp8-tiles")
    layer = FP8Linear(128, 256, block_size=(128, 128), has_bias=True)
    layer.weight = nn.Parameter(parts["weight"], requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(parts["weight_scale_inv"], requires_grad=False)
    nn.init.normal_(layer.bias)
    base = adopt(layer.eval())
    assert isinstance(base, CodedLinear)
    assert not base.training
    assert base.weight.data_ptr() == layer.weight.data_ptr()
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    expected = nn.functional.linear(x, parts["decoded"], layer.bias.bfloat16())
    assert (base(x) - expected).norm() <= 2.0**-7 * expected.norm()


def test_a_grouped_module_is_no_linear_layer() -> None:
    from transformers.integrations.finegrained_fp8 import FP8GroupedLinear

    assert adopt(FP8GroupedLinear(64, 32, n_groups=2, block_size=(128, 128))) is None


def test_a_module_of_compressed_tensors_keeps_its_bytes() -> None:
    parts = read("int4-compressed-32")
    layer = nn.Linear(256, 32, bias=False)
    del layer.weight
    for name in ("weight_packed", "weight_scale", "weight_shape"):
        layer.register_buffer(name, parts[name])
    base = adopt(layer)
    assert isinstance(base, CodedLinear)
    assert torch.equal(base.matrix().bfloat16(), parts["decoded"])


def test_codes_without_scales_are_no_released_layer() -> None:
    layer = nn.Linear(128, 256, bias=False)
    layer.weight = nn.Parameter(read("fp8-tiles")["weight"], requires_grad=False)
    assert released_linear(layer) is None


JOINED = ["mxfp4-compressed", "nvfp4-modelopt", "int4-compressed-128", "fp8-rows", "fp8-mx", "fp8-tiles"]


@pytest.mark.parametrize("layout", JOINED)
def test_joined_rows(layout: str) -> None:
    parts = bad(layout)
    weight = released_weight(parts)
    both = join_rows([weight, weight])
    dense = ops.dequantize(weight)
    assert torch.equal(ops.dequantize(both), torch.cat([dense, dense]))
    assert join_rows([weight]) is weight


def scales_of(weight: ops.QuantizedWeight) -> Tensor:
    assert weight.nested_absmax is not None
    return weight.nested_absmax


@pytest.mark.parametrize("order", [(0, 1), (0, 1, 0), (0, 0, 1, 1)])
def test_joined_rows_of_two_global_scales(order: tuple[int, ...]) -> None:
    first = released_weight(bad("nvfp4-compressed"))
    both = [first, first._replace(nested_absmax=3 * scales_of(first))]
    weights = [both[number] for number in order]
    expected = torch.cat([ops.dequantize(weight) for weight in weights])
    found = join_rows(weights)
    assert torch.equal(ops.dequantize(found), expected)
    assert torch.equal(ops.linear(torch.eye(256), found), expected.T)


def test_what_cannot_be_joined() -> None:
    mx, other = released_weight(bad("mxfp4-compressed")), released_weight(bad("nvfp4-compressed"))
    with pytest.raises(ValueError, match="several formats"):
        join_rows([mx, other])
    doubled, halved = (other._replace(nested_absmax=factor * scales_of(other)) for factor in (2.0, 0.5))
    for weights in ([other, doubled, halved], [other._replace(absmax=other.absmax | 128), doubled]):
        with pytest.raises(ValueError, match="several global scales, or of negative ones"):
            join_rows(weights)
    codes = torch.zeros(200, 256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    cut = released_weight({"weight": codes, "weight_scale_inv": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="whose tiles end inside"):
        join_rows([cut, cut])


def test_needs_no_library() -> None:
    assert not {"compressed_tensors", "modelopt"} & sys.modules.keys()
