"""The batches that a model reads for a calibration.

Padding never enters the model: a batch is cut at its attention mask, and rows of the same length run together.
Therefore experts do not see padding either, although their inputs do not show which token they belong to.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pissa.base.digest import fingerprint, xxh3_of_text

Batch = Mapping[str, Any] | Tensor
"""Arguments of the model without labels, or only input_ids."""

_MASK = "attention_mask"
_NEEDLESS = {"use_cache": False, "logits_to_keep": torch.tensor([-1])}
"""Arguments of transformers' models that avoid computing what no layer reads: cached keys, and logits. (For the number
of logits, 1, Gemma 4 computes its last blocks only for the last token.)"""


def digest_of(batches: Iterable[Batch]) -> str:
    """The XXH3-128 of all tensors of the batches. A run can only be continued with the same ones."""
    tensors = (
        f"{number} {name} {fingerprint(value)}"
        for number, batch in enumerate(batches)
        for name, value in _arguments(batch).items()
        if isinstance(value, Tensor)
    )
    return xxh3_of_text(" ".join(tensors))


def calls_of(model: nn.Module, batch: Batch) -> Iterator[dict[str, Any]]:
    """Yields the arguments with which the (unwrapped) model reads a batch. Each part contains rows of one length, from
    the first to the last token of the mask.

    Raises:
        TypeError: the batch is neither a mapping nor a tensor.
        ValueError: the mask has holes.
    """
    known, device = inspect.signature(model.forward).parameters, next(model.parameters()).device
    needless = {name: value for name, value in _NEEDLESS.items() if name in known}
    for part in _without_padding(_arguments(batch)):
        if device.type != "meta":  # accelerate moves the inputs of a model that it offloads
            part = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in part.items()}
        yield part | needless


def _arguments(batch: Batch) -> dict[str, Any]:
    if isinstance(batch, Tensor):
        return {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise TypeError(f"calibration: got a batch of {type(batch).__name__}; needed: a mapping, or input_ids")
    return {name: value for name, value in batch.items() if name != "labels"}


def _without_padding(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    mask = arguments.get(_MASK)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        yield arguments
        return
    there = mask.bool().cpu()
    lengths, firsts = there.sum(1), there.int().argmax(1)
    spans: dict[tuple[int, int], list[int]] = {}
    for row, (first, length) in enumerate(zip(firsts.tolist(), lengths.tolist(), strict=True)):
        if not bool(there[row, first : first + length].all()):
            raise ValueError(
                f"calibration: row {row} of {_MASK} has zeros between ones; needed: ones that stand together"
            )
        if length:
            spans.setdefault((first, length), []).append(row)
    for (first, length), rows in spans.items():
        yield {name: _rows(value, rows, slice(first, first + length), mask.shape) for name, value in arguments.items()}


def _rows(value: Any, rows: list[int], span: slice, shape: torch.Size) -> Any:
    if not isinstance(value, Tensor) or value.shape[:1] != shape[:1]:
        return value
    return value[rows, span] if value.shape[:2] == shape else value[rows]
