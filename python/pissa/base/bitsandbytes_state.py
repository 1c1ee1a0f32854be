"""Conversion between quantised weights and the entries of a bitsandbytes state dict, and their description in
config.json. Does not import bitsandbytes.

nf4, `Linear4bit`: "weight" uint8 [bytes, 1] and, after "weight.", absmax, quant_map, nested_absmax, nested_quant_map
and quant_state, which is JSON as bytes. int8, `Linear8bitLt`: "weight" int8 [out, in], "SCB" float32 [out], and
"weight_format" uint8 [], 0 for rows.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pissa import ops
from pissa.base.stored import residual_from, residual_shapes
from pissa.config import Form
from pissa.ops.formats import FORMATS, NESTED_BLOCKSIZE

KEPT_IN_4_BITS = "nf4"
"""The format that bitsandbytes' `Linear4bit` computes with."""

_ROWS = 0
"""The `weight_format` of codes in row order, the only one that bitsandbytes still has."""

_STATES = "weight.quant_state.bitsandbytes__"
_STATE = f"{_STATES}{KEPT_IN_4_BITS}"

ENTRIES = {
    f".{_STATES}": (
        *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
        *(f"{_STATES}{quant_type}" for quant_type in (KEPT_IN_4_BITS, "fp4")),
    ),
    ".SCB": ("weight", "SCB", "weight_format"),
}
"""The entries of a packed weight, by the suffix that follows the layer's name if the weight is packed so."""

_FLAGS = {"nf4": "load_in_4bit", "int8": "load_in_8bit"}
"""The field of `BitsAndBytesConfig` that declares each format to transformers."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_LONGEST_FLOAT = 24
"""The largest number of characters of a float64 in JSON. Every file reserves that much for the offset, with blanks
after the object, so that a tensor's size does not depend on values."""

# ---- To entries ------------------------------------------------------------------------------------------------------


def to_bitsandbytes(weight: ops.QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the entries of a matrix [out, in], without copying its bytes. `dtype` is that of the dense weight, to
    which bitsandbytes dequantises NF4. Raises ValueError for a format that bitsandbytes does not have."""
    if weight.format not in _FLAGS:
        raise ValueError(
            f"quant: got {weight.format!r}, whose bytes only pissa reads; allowed in a checkpoint: "
            f"{', '.join(map(repr, _FLAGS))}. Or quantise in memory: pissa.wrap(model, quant={weight.format!r})"
        )
    if weight.format == "int8":
        codes = weight.codes.view(torch.int8).reshape(weight.shape)
        return {"weight": codes, "SCB": weight.absmax, "weight_format": torch.tensor(_ROWS, dtype=torch.uint8)}
    entries = {"weight": weight.codes.reshape(-1, 1), "weight.absmax": weight.absmax}
    entries["weight.quant_map"] = _nf4_map().to(weight.device, copy=True)
    state = {
        "quant_type": weight.format,
        "blocksize": weight.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    length = len(json.dumps(state))
    if weight.nested_absmax is not None and weight.offset is not None:
        entries["weight.nested_absmax"] = weight.nested_absmax
        entries["weight.nested_quant_map"] = _nested_map().to(weight.device, copy=True)
        state |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": 0.0}
        length = len(json.dumps(state)) - len(json.dumps(0.0)) + _LONGEST_FLOAT
        if not weight.offset.is_meta:
            state["nested_offset"] = weight.offset.item()
    text = json.dumps(state).encode().ljust(length)
    entries[_STATE] = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(weight.device)
    return entries


@functools.cache  # the layers of a model share a few shapes
def entry_layout(
    form: Form, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtypes and shapes of what `to_bitsandbytes` returns for a weight [out, in] quantised in that form."""
    parts = {
        name: torch.empty(size, dtype=part_dtype, device="meta")
        for name, (size, [part_dtype]) in residual_shapes(form, shape).items()
    }
    weight = residual_from(parts, form, shape)
    assert isinstance(weight, ops.QuantizedWeight)
    return {name: (value.dtype, tuple(value.shape)) for name, value in to_bitsandbytes(weight, dtype).items()}


# The maps give the values of our own codes. Each value is decoded from one code.


@functools.cache
def _nf4_map() -> Tensor:
    """float32 [16]: the value of each code."""
    pairs = torch.tensor([16 * code + code + 1 for code in range(0, 16, 2)], dtype=torch.uint8)
    scale = torch.ones(1, dtype=torch.float32)
    return ops.dequantize(ops.QuantizedWeight(pairs, scale, None, None, "nf4", (1, 16), 32))[0]


@functools.cache
def _nested_map() -> Tensor:
    """float32 [256]: the value of each code of a nested scale. Each is the scale of a block of ones."""
    blocksize, shape = 32, (256, 32)
    ones = torch.full((math.prod(shape) // 2,), 0xFF, dtype=torch.uint8)
    scales, scale_of_scales = torch.arange(256, dtype=torch.uint8), torch.ones(1, dtype=torch.float32)
    offset = torch.zeros((), dtype=torch.float32)
    weight = ops.QuantizedWeight(ones, scales, scale_of_scales, offset, "nf4", shape, blocksize)
    return ops.dequantize(weight)[:, 0].contiguous()


# ---- From entries ----------------------------------------------------------------------------------------------------


def from_state(entries: Mapping[str, Tensor]) -> ops.QuantizedWeight:
    """The inverse of `to_bitsandbytes`, without copying bytes. `entries` are those of one layer in the state dict of
    `Linear4bit` or `Linear8bitLt`, by their names in it; "bias" is not read."""
    if "SCB" in entries or ("weight" in entries and entries["weight"].dtype == torch.int8):
        return _int8_from_state(entries)
    return nf4_from_state(entries)[0]


def _int8_from_state(entries: Mapping[str, Tensor]) -> ops.QuantizedWeight:
    if not {"weight", "SCB"} <= entries.keys():
        raise ValueError(
            f"no 8-bit weight of bitsandbytes: got the entries {sorted(entries)}; needed: weight and scales, SCB [P037]"
        )
    codes, scales = entries["weight"], entries["SCB"]
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ValueError(f"weight: got {codes.dtype} {list(codes.shape)}; needed: torch.int8 [out, in]")
    if scales.dtype != torch.float32 or scales.numel() != len(codes):
        raise ValueError(f"SCB: got {scales.dtype} {list(scales.shape)}; needed: torch.float32 [{len(codes)}]")
    # As bitsandbytes reads it: a missing entry means rows.
    if (order := entries.get("weight_format")) is not None and order.flatten().tolist() != [_ROWS]:
        raise ValueError(f"weight_format: got {order.tolist()}; allowed: {_ROWS}, for codes row by row")
    shape = (codes.shape[0], codes.shape[1])
    return ops.QuantizedWeight(as_bytes(codes.contiguous()), scales.reshape(-1), None, None, "int8", shape, shape[1])


def nf4_from_state(entries: Mapping[str, Tensor]) -> tuple[ops.QuantizedWeight, torch.dtype]:
    """Returns the weight, and the dtype to which bitsandbytes decodes it; see `from_state`."""
    quant_types = [name.removeprefix(_STATES) for name in entries if name.startswith(_STATES)]
    if quant_types not in ([], ["nf4"]):
        raise ValueError(f"weight: quantised as {', '.join(quant_types)}; allowed: nf4")
    needed = {"weight", "weight.absmax", "weight.quant_map"}
    if quant_types:
        shape, blocksize, dtype, mean = _parse(entries[_STATE])
        needed |= set() if mean is None else {"weight.nested_absmax", "weight.nested_quant_map"}
    if not quant_types or not needed <= entries.keys():
        raise ValueError(
            f"no 4-bit weight of bitsandbytes: got the entries {sorted(entries)}; needed: weight, its absmax, "
            "quant_map, quant_state.bitsandbytes__nf4; with double quantisation nested_absmax, nested_quant_map [P037]"
        )
    codes, absmax, nested = as_bytes(entries["weight"]), entries["weight.absmax"], entries.get("weight.nested_absmax")
    is_nested = mean is not None
    if (nested is not None) != is_nested or (absmax.dtype == torch.uint8) != is_nested:
        raise ValueError("weight.nested_absmax: needed just where weight.absmax is quantised, in uint8")
    offset = None if mean is None else torch.tensor(mean, dtype=torch.float32, device=absmax.device)
    weight = ops.QuantizedWeight(codes, absmax, nested, offset, "nf4", shape, blocksize)
    for name, (size, part_dtype) in FORMATS["nf4"].tensors(shape, blocksize, is_nested).items():
        part = weight.tensors()[name]
        if (part.numel(), part.dtype) != (math.prod(size), part_dtype):
            raise ValueError(
                f"weight: {name} of a matrix {list(shape)} in blocks of {blocksize}: got {part.dtype} "
                f"{list(part.shape)}; needed: {part_dtype} {list(size)}"
            )
    return weight, dtype


def as_bytes(packed: Tensor) -> Tensor:
    """The codes in a tensor of any dtype (bitsandbytes' `quant_storage`), as bytes."""
    return packed.reshape(-1).view(torch.uint8)


def _parse(packed: Tensor) -> tuple[tuple[int, int], int, torch.dtype, float | None]:
    """Returns what bitsandbytes stores of a weight in addition to tensors: its shape, its block size, the dtype to
    which it is dequantised, and the mean of scales that are quantised too. Every value is checked before use."""
    is_text = packed.dtype == torch.uint8 and packed.dim() == 1
    _need(is_text, "the entry", f"{packed.dtype} {list(packed.shape)}", "uint8 in one dimension")
    text = bytes(packed.tolist())
    try:
        state: Any = json.loads(text.decode())
    except (ValueError, RecursionError):
        state = None
    _need(isinstance(state, dict), "the entry", text, "an object of JSON in UTF-8")
    shape, blocksize, dtype = (state.get(name) for name in ("shape", "blocksize", "dtype"))
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(type(side) is int and side > 0 for side in shape)
    _need(is_shape, "shape", shape, "[out, in], each from 1 on")
    allowed = FORMATS["nf4"].blocksizes
    _need(type(blocksize) is int and blocksize in allowed, "blocksize", blocksize, ", ".join(map(str, allowed)))
    _need(isinstance(dtype, str) and dtype in _DTYPES, "dtype", dtype, ", ".join(_DTYPES))
    for name, needed in {"quant_type": "nf4", "nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}.items():
        _need(state.get(name, needed) == needed, name, state.get(name), str(needed))
    mean: Any = state.get("nested_offset")
    if "nested_offset" in state:
        is_finite = type(mean) in (int, float) and abs(mean) <= torch.finfo(torch.float32).max
        _need(is_finite, "nested_offset", mean, "a finite number")
        mean = float(mean)
    return (shape[0], shape[1]), blocksize, _DTYPES[dtype], mean


def _need(is_right: bool, name: str, got: object, needed: str) -> None:
    text = repr(got)
    text = text if len(text) <= 200 else f"{text[:200]}..."
    if not is_right:
        raise ValueError(
            f"{_STATE}: {name}: got {text}; needed: {needed}. The state dict is damaged, or not bitsandbytes' own: "
            "quantise the weight again [P037]"
        )


# ---- config.json -----------------------------------------------------------------------------------------------------


def quantization_config(
    form: Form, dtype: torch.dtype, dense_linears: Sequence[str], *, experts: bool = False
) -> dict[str, Any]:
    """`BitsAndBytesConfig` as JSON, for layers quantised in `form` whose weights had that dtype. transformers would
    treat packed experts as missing and initialise them at random. With such experts, the JSON therefore names a method
    that transformers does not know, and it loads nothing."""
    flag = _FLAGS[form.name]
    half = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
    flags = {f"{hidden}{name}": name == flag for hidden in ("_", "") for name in _FLAGS.values()}
    return {
        **({"quant_method": "pissa"} if experts else {"quant_method": "bitsandbytes", **flags}),
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": list(dense_linears),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_compute_dtype": str(half).removeprefix("torch."),
        "bnb_4bit_quant_type": form.name if flag == "load_in_4bit" else "fp4",
        "bnb_4bit_use_double_quant": bool(form.double_quant),
        "bnb_4bit_quant_storage": "uint8",
    }
