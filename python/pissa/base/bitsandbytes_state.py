"""Quantised weights as entries of a state dict of bitsandbytes, and what config.json says of them, written without
importing it.

nf4, `Linear4bit`: "weight" uint8 [bytes, 1] and, behind "weight.", absmax, quant_map, nested_absmax, nested_quant_map
and quant_state. int8, `Linear8bitLt`: "weight" int8 [out, in], "SCB" float32 [out], and "weight_format" uint8 [], 0 for
rows.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pissa import ops
from pissa.config import Form
from pissa.ops.formats import FORMATS, NESTED_BLOCKSIZE

ROWS = 0
"""The `weight_format` of codes that lie row by row, the only one that bitsandbytes still has."""

STATE = "weight.quant_state.bitsandbytes__"
"""The entry, with the name of the type behind it, that holds what is no tensor: JSON as bytes."""

_STATE = f"{STATE}nf4"

KEPT_IN_4_BITS = "nf4"
"""The format that bitsandbytes' `Linear4bit` computes with."""

ENTRIES = {
    f".{STATE}": (
        *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
        *(f"{STATE}{kind}" for kind in (KEPT_IN_4_BITS, "fp4")),
    ),
    ".SCB": ("weight", "SCB", "weight_format"),
}
"""The entries of a packed weight, by what a name has behind the layer's if the weight is packed so."""

_FLAGS = {"nf4": "load_in_4bit", "int8": "load_in_8bit"}
"""How each format is declared to transformers, in `BitsAndBytesConfig`."""

_LONGEST_FLOAT = 24
"""Characters of a float64 in JSON, at most. The offset's place is that long in every file, filled up with blanks behind
the object, so that the size of a tensor does not depend on values."""


def to_bitsandbytes(weight: ops.QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """`weight` as the entries, without copying its bytes.

    Args:
        weight: codes of a matrix [out, in].
        dtype: of the dense weight, which bitsandbytes dequantises NF4 to.
    """
    if weight.format == "int8":
        codes = weight.codes.view(torch.int8).reshape(weight.shape)
        return {"weight": codes, "SCB": weight.absmax, "weight_format": torch.tensor(ROWS, dtype=torch.uint8)}
    entries = {"weight": weight.codes.reshape(-1, 1), "weight.absmax": weight.absmax}
    entries["weight.quant_map"] = _nf4_map().to(weight.device, copy=True)
    offset = None
    if weight.nested_absmax is not None and weight.offset is not None:
        entries["weight.nested_absmax"] = weight.nested_absmax
        entries["weight.nested_quant_map"] = _nested_map().to(weight.device, copy=True)
        offset = weight.offset.item()
    text = _quant_state(weight.shape, weight.blocksize, dtype, offset)
    length = _state_length(weight.shape, weight.blocksize, dtype, weight.nested)
    entries[_STATE] = torch.frombuffer(bytearray(text.encode().ljust(length)), dtype=torch.uint8).to(weight.device)
    return entries


def entry_layout(
    form: Form, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtypes and shapes of what `to_bitsandbytes` gives for any weight [out, in] quantised in that form."""
    format = FORMATS[form.kind]
    blocksize, nested = format.options(form.blocksize, form.double_quant, shape[1])
    tensors = {name: (kind, size) for name, (size, kind) in format.tensors(shape, blocksize, nested).items()}
    if form.kind == "int8":
        return {"weight": (torch.int8, shape), "SCB": tensors["absmax"], "weight_format": (torch.uint8, ())}
    entries = {
        "weight": (torch.uint8, (*tensors["codes"][1], 1)),
        "weight.absmax": tensors["absmax"],
        "weight.quant_map": (torch.float32, (16,)),
    }
    if nested:
        entries["weight.nested_absmax"] = tensors["nested_absmax"]
        entries["weight.nested_quant_map"] = (torch.float32, (256,))
    return entries | {_STATE: (torch.uint8, (_state_length(shape, blocksize, dtype, nested),))}


def _quant_state(shape: tuple[int, int], blocksize: int, dtype: torch.dtype, offset: float | None) -> str:
    """What bitsandbytes keeps of a weight beside its tensors. `offset`: of nested scales."""
    state = {
        "quant_type": "nf4",
        "blocksize": blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    if offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state)


def _state_length(shape: tuple[int, int], blocksize: int, dtype: torch.dtype, nested: bool) -> int:
    if not nested:
        return len(_quant_state(shape, blocksize, dtype, None))
    return len(_quant_state(shape, blocksize, dtype, 0.0)) - len(json.dumps(0.0)) + _LONGEST_FLOAT


def quantization_config(
    form: Form, dtype: torch.dtype, dense_linears: Sequence[str], *, experts: bool = False
) -> dict[str, Any]:
    """`BitsAndBytesConfig` as JSON, written without importing bitsandbytes. transformers would take packed
    experts for missing and draw them at random: with them the method is one that it does not know, and it loads
    nothing.

    Args:
        form: of the quantised layers.
        dtype: of their weights before.
        dense_linears: the linear layers that are not quantised.
        experts: whether fused experts are quantised, too.
    """
    flag = _FLAGS[form.kind]
    half = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
    flags = {f"{hidden}{name}": name == flag for hidden in ("_", "") for name in _FLAGS.values()}
    return {
        **({"quant_method": "pissa"} if experts else {"quant_method": "bitsandbytes", **flags}),
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": list(dense_linears),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_compute_dtype": str(half).removeprefix("torch."),
        "bnb_4bit_quant_type": form.kind if flag == "load_in_4bit" else "fp4",
        "bnb_4bit_use_double_quant": bool(form.double_quant),
        "bnb_4bit_quant_storage": "uint8",
    }


# The maps are what our own codes mean: decoded from one code each.


@functools.cache
def _nf4_map() -> Tensor:
    """float32 [16]: the value of each code."""
    pairs = torch.tensor([16 * code + code + 1 for code in range(0, 16, 2)], dtype=torch.uint8)
    return ops.dequantize(ops.QuantizedWeight(pairs, torch.ones(1), None, None, "nf4", (1, 16), 32))[0]


@functools.cache
def _nested_map() -> Tensor:
    """float32 [256]: the value of each code of a nested scale. Each is the scale of a block of ones."""
    blocksize, shape = 32, (256, 32)
    ones = torch.full((math.prod(shape) // 2,), 0xFF, dtype=torch.uint8)
    scales = torch.arange(256, dtype=torch.uint8)
    weight = ops.QuantizedWeight(ones, scales, torch.ones(1), torch.zeros(()), "nf4", shape, blocksize)
    return ops.dequantize(weight)[:, 0].contiguous()
