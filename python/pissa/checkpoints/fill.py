"""Bases in the place of weights that are on the meta device still."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pissa.base.bitsandbytes import linear4bit
from pissa.base.kinds import base_of
from pissa.base.protocol import Base
from pissa.checkpoints.packed import Entries
from pissa.files.messages import shown
from pissa.layers.layer import PissaLayer


def base_at(model: nn.Module, name: str) -> Base:
    """The base of a layer of that name, adapted or not."""
    module = model.get_submodule(name)
    return module.base if isinstance(module, PissaLayer) else base_of(module)


def put(model: nn.Module, name: str, base: nn.Module) -> None:
    """Puts a base in the place of that one."""
    module = model.get_submodule(name)
    base.train(base_at(model, name).module.training)
    if isinstance(module, PissaLayer):
        module.base_layer = base
    else:
        model.set_submodule(name, base)


@contextmanager
def of_layer(name: str) -> Iterator[None]:
    """Names the layer in errors of the block.

    Raises:
        ValueError: for a ValueError.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {shown(name)}: {error}") from error


def check_shape(found: tuple[int, int], base: Base) -> None:
    """Raises ValueError if a matrix of this shape is not the base's."""
    if found != (needed := tuple(base.matrix().shape)):
        raise ValueError(f"its weight is {list(found)} in the folder and {list(needed)} in the model")


def fill_packed(model: nn.Module, packed: Mapping[str, Entries], quantization: Mapping[str, Any]) -> None:
    """Gives a model the 4-bit weights that bitsandbytes has made, as they are in a folder.

    Args:
        model: the (unwrapped) model, adapted.
        packed: the weights, by the layers' names.
        quantization: the folder's `quantization_config`.

    Raises:
        ValueError: naming the layer whose weight is not 4-bit nf4, or of another shape; or no dtype is to compute in.
    """
    compute_dtype = _compute_dtype(quantization)
    for name, entries in packed.items():
        with of_layer(name):
            if "SCB" in entries:
                raise ValueError(
                    "its weight is in 8 bits, with which only bitsandbytes computes: "
                    "pissa.wrap(AutoModelForCausalLM.from_pretrained(folder), ...)"
                )
            dense = base_at(model, name)
            base = linear4bit(entries, dense.bias, compute_dtype)
            check_shape((base.out_features, base.in_features), dense)
        put(model, name, base)


def _compute_dtype(quantization: Mapping[str, Any]) -> torch.dtype:
    name = quantization.get("bnb_4bit_compute_dtype") or "float32"
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"config.json: bnb_4bit_compute_dtype is {shown(name)}; needed: float32, bfloat16 or float16")
    return found
