"""`pissa finetune`: trains a model on answers, with TRL's SFTTrainer."""

from __future__ import annotations

import argparse
from typing import Any

from pissa.cli.data import encode, read_chats

TRAINER = "SFT"


def run(args: argparse.Namespace) -> int:
    """Runs one training. Returns the exit code."""
    from pissa.cli import training

    return training.run(args, TRAINER, _rows)


def _rows(source: str, seed: int, tokenizer: Any, max_length: int) -> tuple[list[dict[str, Any]], str]:
    rows, cut, left_out = encode(read_chats(source, seed), tokenizer, max_length)
    note = f", {cut:,} answers cut at {max_length} tokens" if cut else ""
    return rows, note + (f", {left_out:,} left out (their prompt alone is longer)" if left_out else "")
