"""The loss of a merged model on records, beside that of its base and of the adapter on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pissa.checkpoints.load import load
from pissa.cli.data import encode, read_chats
from pissa.cli.sources import records
from pissa.containers.checkpoint import ModelFolder
from pissa.containers.hub import Name

LONGEST = 2048
"""Tokens of an example that are read."""


def read_rows(base: Name, data: str) -> list[dict[str, list[int]]]:
    """Input_ids and labels of records, for `losses`. Raises UserError for data that are not read."""
    return encode(read_chats(records(data)), ModelFolder.open(base).tokenizer(), LONGEST)[0]


def losses(base: Name, adapter: Path, merged: Path, rows: list[dict[str, list[int]]]) -> dict[str, float]:
    """The mean losses of the tokens of answers, by what computes them."""
    model: Any = load(base, adapter=adapter, is_trainable=False)
    found = {"adapter": _loss(model, rows)}
    with model.disable_adapter():
        found["base"] = _loss(model, rows)
    del model
    found["merged"] = _loss(load(merged, r=1, init="lora", is_trainable=False), rows)  # a start that changes nothing
    return {what: found[what] for what in ("base", "adapter", "merged")}


@torch.no_grad()
def _loss(model: Any, rows: list[dict[str, list[int]]]) -> float:
    total, count = 0.0, 0
    for row in rows:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        tokens = int((labels[:, 1:] >= 0).sum())
        total += float(model(input_ids=ids, labels=labels).loss) * tokens
        count += tokens
    return total / count
