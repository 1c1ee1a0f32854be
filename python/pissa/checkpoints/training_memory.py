"""The memory that training an adapter takes: exact for what is stored, an estimate for activations."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pissa.config import Form
from pissa.ops.formats import FORMATS

_FLOAT = 4  # bytes of a float32


class Shape(NamedTuple):
    """An adapted layer: its weight [out, in] and the adapter's rank."""

    name: str
    out: int
    inner: int
    r: int


class ModelSizes(NamedTuple):
    """What of a model is not its adapted weights."""

    rest: int
    """Bytes of the tensors that are not adapted: embeddings, norms, biases, the output layer."""
    dtype: torch.dtype
    """Of the dense weights, and of what flows between layers."""
    hidden: int
    """Elements that a block hands on for each token."""
    vocabulary: int
    """Elements of a token's logits; 0 if the model has none."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes, by what takes them."""

    weights: int
    """Adapted weights in their form, and the rest of the model as it is on disk."""
    start: int
    """A0 and B0, float32."""
    trained: int
    """dA and dB, float32."""
    gradients: int
    optimizer: int
    """AdamW's two averages, float32."""
    activations: int
    """What forward keeps for backward, and the logits with their gradients."""

    @property
    def total(self) -> int:
        return self.weights + self.start + self.trained + self.gradients + self.optimizer + self.activations


def training_memory(
    layers: Iterable[Shape], model: ModelSizes, form: Form, *, batch: int, length: int, checkpointing: bool
) -> TrainingMemory:
    """The memory of a training step of `batch` sequences of `length` tokens, without what Python and torch take
    themselves.

    Activations, an estimate: for each token an adapted layer keeps its input and its output; logits take 16 bytes an
    element (16 bits and float32, of the values and of their gradients). With gradient checkpointing each block keeps
    only what it is given, and one block at a time has the rest; the logits are gone by then. What attention keeps for
    each pair of tokens is not counted: implementations that keep it are not the usual ones. Every expert of a mixture
    counts as if it saw every token: an upper bound.
    """
    layers = list(layers)
    parameters = sum(layer.r * (layer.out + layer.inner) for layer in layers)
    weights = model.rest + sum(_weight_bytes(layer, model.dtype, form) for layer in layers)
    blocks: dict[str, int] = {}
    for layer in layers:
        block = _block(layer.name)
        blocks[block] = blocks.get(block, 0) + (layer.out + layer.inner) * model.dtype.itemsize
    logits = 16 * model.vocabulary
    if checkpointing:
        a_token = len(blocks) * model.hidden * model.dtype.itemsize + max(*blocks.values(), logits)
    else:
        a_token = sum(blocks.values()) + logits
    floats = _FLOAT * parameters
    return TrainingMemory(weights, floats, floats, floats, 2 * floats, batch * length * a_token)


def _weight_bytes(layer: Shape, dtype: torch.dtype, form: Form) -> int:
    if form.kind not in FORMATS:
        return layer.out * layer.inner * dtype.itemsize
    format = FORMATS[form.kind]
    options = format.options(form.blocksize, form.double_quant, layer.inner)
    tensors = format.tensors((layer.out, layer.inner), *options)
    return sum(math.prod(shape) * kept.itemsize for shape, kept in tensors.values())


def _block(name: str) -> str:
    """The block of a model that a layer is in: its name up to the first number."""
    parts = name.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), name)
