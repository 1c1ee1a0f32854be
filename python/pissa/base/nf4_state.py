"""What bitsandbytes keeps of an NF4 weight beside tensors: JSON, as bytes in a tensor of its state dict. Every value is
checked before it is used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pissa.ops.formats import FORMATS, NESTED_BLOCKSIZE

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Nf4State:
    """The state of one weight."""

    shape: tuple[int, int]
    """[out, in]."""
    blocksize: int
    dtype: torch.dtype
    """What the weight is dequantised to."""
    offset: float | None
    """The mean of the scales, if these are quantised too."""


def parse(packed: Tensor) -> Nf4State:
    """Reads the entry `weight.quant_state.bitsandbytes__nf4`.

    Raises:
        ValueError: naming the entry and what of it is wrong.
    """
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise _refusal("the entry", f"{packed.dtype} {list(packed.shape)}", "uint8 in one dimension")
    content = bytes(packed.tolist())
    try:
        state: Any = json.loads(content.decode())
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise _refusal("the entry", content, "an object of JSON in UTF-8")
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(_is_positive(side) for side in shape):
        raise _refusal("shape", shape, "[out, in], each from 1 on")
    blocksize, dtype = state.get("blocksize"), state.get("dtype")
    if not _is_positive(blocksize) or blocksize not in FORMATS["nf4"].blocksizes:
        raise _refusal("blocksize", blocksize, ", ".join(map(str, FORMATS["nf4"].blocksizes)))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _refusal("dtype", dtype, ", ".join(_DTYPES))
    for name, needed in {"quant_type": "nf4", "nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}.items():
        if (found := state.get(name, needed)) != needed:
            raise _refusal(name, found, str(needed))
    if "nested_offset" not in state:
        return Nf4State((shape[0], shape[1]), blocksize, _DTYPES[dtype], None)
    offset = state["nested_offset"]
    if type(offset) not in (int, float) or not abs(offset) <= torch.finfo(torch.float32).max:
        raise _refusal("nested_offset", offset, "a finite number")
    return Nf4State((shape[0], shape[1]), blocksize, _DTYPES[dtype], float(offset))


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _refusal(name: str, got: object, needed: str) -> ValueError:
    text = repr(got)
    text = text if len(text) <= 200 else f"{text[:200]}..."
    return ValueError(
        f"weight.quant_state.bitsandbytes__nf4: {name}: got {text}; needed: {needed}. The state dict is damaged, or "
        "not bitsandbytes' own: quantise the weight again"
    )
