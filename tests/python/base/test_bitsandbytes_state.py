"""State dicts of bitsandbytes' layers: our codes are theirs, and theirs ours."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from bnb_layers import IN, OUT, R, bnb, contents, decoded, inputs, linear4bit, linear8bit, nesting, storages
from devices import fetch, put
from one_layer import adapted, filled, wrap
from pissa import ops
from pissa.base import bitsandbytes_state
from pissa.base.bitsandbytes import from_bitsandbytes
from pissa.base.bitsandbytes_state import entry_layout, from_state, to_bitsandbytes
from pissa.base.stored import QuantizedLinear
from pissa.config import Form
from reference import EPS, assert_close
from torch_settings import default_dtype

STATE = "weight.quant_state.bitsandbytes__nf4"


@nesting
@pytest.mark.parametrize("blocksize", [32, 64, 128])
def test_our_codes_are_a_layer_of_bitsandbytes(nested: bool, blocksize: int) -> None:
    weight = put(torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)))
    ours = ops.quantize(weight, blocksize=blocksize, double_quant=nested)
    entries = to_bitsandbytes(ours, torch.bfloat16)
    assert entries["weight"].data_ptr() == ours.codes.data_ptr()
    scales = {name.removeprefix("weight."): value for name, value in entries.items() if name != "weight"}
    theirs = bnb.nn.Params4bit.from_prequantized(entries["weight"], scales, device=weight.device)
    assert theirs.quant_state.dtype == torch.bfloat16
    theirs.quant_state.dtype = torch.float32  # which is not rounded
    dense = bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state)
    assert torch.equal(dense, ops.dequantize(ours))
    if blocksize == 64:  # in which alone we write them
        expected = entry_layout(Form.quantised("nf4", nested), (OUT, IN), torch.bfloat16)
        assert {name: (value.dtype, tuple(value.shape)) for name, value in entries.items()} == expected


def test_the_map_of_nested_scales_does_not_depend_on_the_default_dtype() -> None:
    expected = bitsandbytes_state._nested_map()
    bitsandbytes_state._nested_map.cache_clear()
    with default_dtype(torch.bfloat16):
        assert torch.equal(bitsandbytes_state._nested_map(), expected)


@storages
@nesting
def test_a_state_dict_of_bitsandbytes_is_our_codes(nested: bool, storage: torch.dtype) -> None:
    layer = linear4bit(nested, storage)
    ours, base = from_state(dict(layer.state_dict())), from_bitsandbytes(layer)
    for got, expected in zip(ours, base.quantized, strict=True):
        assert torch.equal(got, expected) if isinstance(got, Tensor) else got == expected
    back = to_bitsandbytes(ours, torch.float32)
    state = layer.state_dict()
    assert {*back, "bias"} == set(state)
    for name, value in back.items():
        if not name.startswith("weight.quant_state."):  # JSON, whose offset bitsandbytes writes as it likes
            assert torch.equal(fetch(value).reshape(-1).view(torch.uint8), contents(layer)[name]), name


@nesting
def test_incomplete_state_dicts_are_refused(nested: bool) -> None:
    entries = to_bitsandbytes(from_bitsandbytes(linear4bit(nested)).quantized, torch.float32)
    for name in entries:
        with pytest.raises(ValueError, match="weight"):
            from_state({key: value for key, value in entries.items() if key != name})
    with pytest.raises(ValueError, match=r"quantised as fp4; allowed: nf4"):
        from_state(dict(linear4bit(quant_type="fp4").state_dict()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [OUT, IN, 1]}, r"shape: got \[64, 128, 1\]; needed: \[out, in\], each from 1 on"),
        ({"shape": [-OUT, -IN]}, r"shape: got \[-64, -128\]"),
        ({"shape": [OUT, 2.0**70]}, "shape: got"),
        ({"blocksize": True}, "blocksize: got True; needed: 32, 64"),
        ({"blocksize": 96}, "blocksize: got 96"),
        ({"dtype": "nn"}, "dtype: got 'nn'; needed: float32, bfloat16, float16"),
        ({"dtype": []}, r"dtype: got \[\]"),
        ({"quant_type": "fp4"}, "quant_type: got 'fp4'; needed: nf4"),
        ({"nested_blocksize": 64}, "nested_blocksize: got 64; needed: 256"),
        ({"nested_offset": 10**400}, "nested_offset: got 1000.*; needed: a finite number"),
        ({"nested_offset": float("nan")}, "nested_offset: got nan"),
        ({"nested_offset": [1.0]}, r"nested_offset: got \[1.0\]"),
    ],
)
def test_what_is_no_state_is_refused(change: dict[str, object], words: str) -> None:
    entries = to_bitsandbytes(ops.quantize(put(torch.ones(OUT, IN))), torch.float32)
    state = json.loads(bytes(entries[STATE].tolist())) | change
    entries[STATE] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"{STATE}: {words}.*quantise the weight again"):
        from_state(entries)


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (torch.tensor(10**12), r"got 'torch.int64 \[\]'; needed: uint8 in one"),  # bytes(n) are n zeros
        (torch.full((4,), 0xFF, dtype=torch.uint8), "needed: an object of JSON"),
    ],
    ids=["scalar", "no text"],
)
def test_bytes_that_are_no_state_are_refused(packed: Tensor, words: str) -> None:
    entries = to_bitsandbytes(ops.quantize(put(torch.ones(OUT, IN))), torch.float32)
    with pytest.raises(ValueError, match=rf"{STATE}: the entry: .*{words}"):
        from_state(entries | {STATE: packed})


@pytest.mark.parametrize("called", [False, True])
def test_a_state_dict_of_8_bits_is_our_codes(called: bool) -> None:
    """Before the layer is called its scales are elsewhere than afterwards."""
    layer = linear8bit()
    if called:
        layer(inputs(3))
    ours = from_state(layer.state_dict())
    weight = put(filled(nn.Linear(IN, OUT)).weight.detach())
    expected = ops.quantize(weight.half(), "int8")  # which bitsandbytes rounds to first
    for got, wanted in zip(ours, expected, strict=True):
        assert torch.equal(got, wanted) if isinstance(got, Tensor) else got == wanted
    theirs = decoded(layer)
    assert_close(ops.dequantize(ours), theirs, 2 * EPS[torch.float32] * theirs.abs(), "decoded")
    back, state = to_bitsandbytes(ours, torch.float32), layer.state_dict()
    assert {*back, "bias"} == set(state)
    for name, value in back.items():
        assert (value.dtype, value.shape) == (state[name].dtype, state[name].shape)
        assert torch.equal(value, state[name]), name


def test_our_8_bit_residual_is_a_layer_of_bitsandbytes() -> None:
    base = adapted(wrap(put(filled(nn.Linear(IN, OUT), seed=5)), r=R, quant="int8")).base
    assert isinstance(base, QuantizedLinear)
    entries = to_bitsandbytes(base.residual, torch.float32)
    assert entries["weight"].data_ptr() == base.residual.codes.data_ptr()
    layout = entry_layout(base.form, (OUT, IN), torch.float32)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in entries.items()} == layout
    layer = linear8bit()
    assert not torch.equal(layer.weight, entries["weight"])
    layer.load_state_dict(entries | {"bias": base.bias})
    assert torch.equal(layer.weight, entries["weight"])
    again = from_state(layer.state_dict())
    assert torch.equal(ops.dequantize(again), base.dense_residual())
    x = inputs(5)
    y, size = x @ base.dense_residual().mT + base.bias, x.abs() @ base.dense_residual().abs().mT
    # bitsandbytes rounds x to 8 bits: half a step of 1/127 of the largest in its row.
    assert ((layer(x) - y).abs() <= 2**-7 * x.abs().amax() / x.abs().mean() * size).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"SCB": None}, r"no 8-bit weight of bitsandbytes: got the entries \['weight', 'weight_format'\]; needed"),
        ({"weight": None}, r"no 8-bit weight .*; needed: weight and scales, SCB"),
        ({"weight": torch.zeros(OUT, IN)}, r"weight: got torch.float32 \[64, 128\]; needed: torch.int8 \[out, in\]"),
        ({"weight": torch.zeros(3, dtype=torch.int8)}, r"weight: got torch.int8 \[3\]; needed"),
        ({"SCB": torch.zeros(IN)}, r"SCB: got torch.float32 \[128\]; needed: torch.float32 \[64\]"),
        ({"SCB": torch.zeros(OUT).half()}, r"SCB: got torch.float16 \[64\]"),
        ({"weight_format": torch.tensor(2, dtype=torch.uint8)}, r"weight_format: got 2; allowed: 0"),
    ],
)
def test_what_is_no_8_bit_weight_is_refused(change: dict[str, Tensor | None], words: str) -> None:
    entries = to_bitsandbytes(ops.quantize(torch.ones(OUT, IN), "int8"), torch.float32) | change
    with pytest.raises(ValueError, match=words):
        from_state({name: value for name, value in entries.items() if value is not None})
