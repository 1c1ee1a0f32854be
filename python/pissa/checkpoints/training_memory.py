"""The memory that training an adapter takes: exact for what is stored, an estimate for activations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import torch

from pissa.config import Form
from pissa.ops.formats import FORMATS


def training_memory(
    layers: Mapping[str, tuple[int, int]],
    r: int,
    form: Form,
    *,
    rest: int,
    dtype: torch.dtype,
    hidden: int,
    vocabulary: int,
    tokens: int,
) -> dict[str, dict[str, int]]:
    """The bytes of a training step by what takes them, and their total, without what Python and torch take themselves:
    "plain", and with gradient "checkpointing".

    Activations, an estimate: for each token an adapted layer keeps its input and its output; logits take 16 bytes an
    element (16 bits and float32, of the values and of their gradients). With gradient checkpointing each block keeps
    only what it is given, and one block at a time has the rest; the logits are gone by then. What attention keeps for
    each pair of tokens is not counted: implementations that keep it are not the usual ones. Every expert of a mixture
    counts as if it saw every token: an upper bound.

    Args:
        layers: the shapes [out, in] of the adapted weights, by the layers' names.
        r: the rank of the adapter; of a layer with a smaller side, that side.
        form: how the adapted weights are kept.
        rest: bytes of the tensors that are not adapted: embeddings, norms, biases, the output layer.
        dtype: of the dense weights, and of what flows between layers.
        hidden: elements that a block hands on for each token.
        vocabulary: elements of a token's logits; 0 if the model has none.
        tokens: of a step.
    """
    factors = 4 * sum(min(r, *shape) * sum(shape) for shape in layers.values())  # float32
    blocks = Counter[str]()
    for name, shape in layers.items():
        blocks[_block(name)] += sum(shape) * dtype.itemsize
    logits = 16 * vocabulary
    of_a_token = {
        "plain": blocks.total() + logits,
        "checkpointing": len(blocks) * hidden * dtype.itemsize + max(*blocks.values(), logits),
    }
    stored = {
        "weights": rest + sum(_weight_bytes(shape, dtype, form) for shape in layers.values()),
        "start": factors,  # A0 and B0
        "trained": factors,  # dA and dB
        "gradients": factors,
        "optimizer": 2 * factors,  # AdamW's two averages
    }
    found = {kind: stored | {"activations": tokens * count} for kind, count in of_a_token.items()}
    return {kind: parts | {"total": sum(parts.values())} for kind, parts in found.items()}


def _weight_bytes(shape: tuple[int, int], dtype: torch.dtype, form: Form) -> int:
    if form.kind not in FORMATS:
        return math.prod(shape) * dtype.itemsize
    format = FORMATS[form.kind]
    tensors = format.tensors(shape, *format.options(form.blocksize, form.double_quant, shape[1]))
    return sum(math.prod(size) * kept.itemsize for size, kept in tensors.values())


def _block(name: str) -> str:
    """The block of a model that a layer is in: its name up to the first number."""
    parts = name.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), name)
