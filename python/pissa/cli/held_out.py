"""The loss of a merged model on records, beside that of its base and of the adapter on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pissa.adapters.lora_folder import open_adapter
from pissa.checkpoints.load import load
from pissa.cli.data import encode, read_chats
from pissa.cli.sources import records
from pissa.cli.trained import check_has_base, load_trained
from pissa.containers.checkpoint import ModelFolder
from pissa.containers.hub import Name

Rows = list[dict[str, list[int]]]
"""Input_ids and labels of examples."""

LONGEST = 2048
"""Tokens of an example that are read."""


def read_rows(base: Name, data: str) -> Rows:
    """Input_ids and labels of records. Raises UserError for data that are not read."""
    return encode(read_chats(records(data)), ModelFolder.open(base).tokenizer(), LONGEST)[0]


def losses_before(base: Name, adapter: Path, rows: Rows) -> dict[str, float]:
    """The mean losses of the tokens of answers, of a base and of an adapter on it.

    Raises:
        UserError: the adapter cannot be disabled to get its base.
    """
    lora, opened = open_adapter(adapter), ModelFolder.open(base)
    check_has_base("--data", lora, opened)
    model = load_trained(base, opened, lora)
    with model.disable_adapter():
        of_base = _loss(model, rows)
    return {"base": of_base, "adapter": _loss(model, rows)}


def loss_merged(merged: Path, rows: Rows) -> float:
    """The same of a merged model. Only bitsandbytes computes with its codes in 8 bits."""
    opened = ModelFolder.open(merged)
    if opened.quantization.get("load_in_8bit"):
        return _loss(load_trained(merged, opened, None), rows)
    return _loss(load(merged, r=1, init="lora", is_trainable=False), rows)  # a start that changes nothing


@torch.no_grad()
def _loss(model: Any, rows: Rows) -> float:
    total, count = 0.0, 0
    for row in rows:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        tokens = int((labels[:, 1:] >= 0).sum())
        total += float(model(input_ids=ids, labels=labels).loss) * tokens
        count += tokens
    return total / count
