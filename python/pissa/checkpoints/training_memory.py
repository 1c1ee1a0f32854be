"""The memory of a training step, from the shapes of a model's layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import torch


def training_memory(
    layers: Mapping[str, tuple[int, int]],
    r: int,
    *,
    weights: int,
    dtype: torch.dtype,
    hidden: int,
    tokens: int,
) -> dict[str, dict[str, int]]:
    """Returns the bytes of a training step by their use, and their total, without the memory of Python and torch
    themselves: "plain", and with gradient "checkpointing".

    Activations are an estimate: for each token, an adapted layer keeps its input and its output. With gradient
    checkpointing, each block keeps only its input, and one block at a time keeps the rest. Logits are not counted,
    because the loss does without them. Nor is what attention stores for each pair of tokens, because the usual
    implementations do not store it. Every expert of a mixture counts as if it saw every token, which is an upper bound.

    Args:
        layers: the shapes [out, in] of the adapted weights, by the layers' names.
        r: the rank of the adapter; a layer with a smaller side has that side as its rank.
        weights: bytes of the model, including tensors that are not adapted.
        dtype: dtype of the activations between layers.
        hidden: elements that a block passes on for each token.
    """
    factors = 4 * sum(min(r, *shape) * sum(shape) for shape in layers.values())  # float32
    blocks = Counter[str]()
    for name, shape in layers.items():
        blocks[re.sub(r"(?<![^.])(\d+)\..*", r"\1", name)] += sum(shape) * dtype.itemsize  # up to the first number
    of_a_token = {
        "plain": blocks.total(),
        "checkpointing": len(blocks) * hidden * dtype.itemsize + max(blocks.values()),
    }
    stored = {
        "weights": weights,
        "start": factors,  # A0 and B0
        "trained": factors,  # dA and dB
        "gradients": factors,
        "optimizer": 2 * factors,  # AdamW's two averages
    }
    by_kind = {method: stored | {"activations": tokens * count} for method, count in of_a_token.items()}
    return {method: parts | {"total": sum(parts.values())} for method, parts in by_kind.items()}
