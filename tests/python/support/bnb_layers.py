"""Layers of bitsandbytes, quantised, and what is in them."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from devices import fetch, put
from one_layer import filled
from pissa.base import bitsandbytes_state

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of kernels that it could download
    import bitsandbytes as bnb

if sys.platform == "win32":
    # torch for Windows rounds linspace otherwise, in a bit, and so bitsandbytes its values of nested scales. Ours are
    # Linux's.
    bnb.functional.name2qmap["dynamic"] = bitsandbytes_state._nested_map()

# Blocks of 64 in whole rows: on a CPU bitsandbytes 0.50.2 decodes nothing else rightly.
IN, OUT, R = 128, 64, 4
STORAGES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
storages = pytest.mark.parametrize("storage", STORAGES, ids=str)
nesting = pytest.mark.parametrize("nested", [False, True])


def linear4bit(
    nested: bool = True,
    storage: torch.dtype = torch.uint8,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    quant_type: str = "nf4",
) -> Any:
    """Quantised from a weight of that dtype; in training mode, in which bitsandbytes does not repack it."""
    layer = bnb.nn.Linear4bit(
        IN, OUT, bias=bias, quant_type=quant_type, compress_statistics=nested, quant_storage=storage
    )
    return filled(layer).to(dtype).to(put(torch.empty(0)).device)


def linear8bit(bias: bool = True) -> Any:
    return filled(bnb.nn.Linear8bitLt(IN, OUT, bias=bias, has_fp16_weights=False)).to(put(torch.empty(0)).device)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return put(torch.randn(*shape, IN, generator=torch.Generator().manual_seed(7)).to(dtype))


def decoded(layer: Any) -> Tensor:
    """By bitsandbytes, float64."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return fetch(layer.weight.data).double() * fetch(scales).double()[:, None] / 127
    return fetch(bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)).double()


def contents(layer: Any) -> dict[str, Tensor]:
    """The bytes of all that the layer saves."""
    return {name: fetch(value).reshape(-1).view(torch.uint8).clone() for name, value in layer.state_dict().items()}
