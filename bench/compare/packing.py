"""Times training on examples as they are, padded to the longest of a batch, and packed into rows without padding.

    python -m bench.compare.packing --model FOLDER --data train.jsonl --json bench/results/packing.json

Both sides train a LoRA, r = 16, in bfloat16, on the same 64 examples: batches of 8 in random order, and rows of 2,048
tokens by TRL's packing. The sides alternate, three times each, in one process; a rate is of tokens that have a label.
The losses of the untrained model are compared, over all labels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import pissa
from bench.compare.records import machine, write
from pissa.cli.data import IGNORED, encode, read_chats
from pissa.cli.sources import records

EXAMPLES, BATCH, ROW, REPEATS = 64, 8, 2048, 3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare.packing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a language model with its tokenizer")
    parser.add_argument("--data", required=True, metavar="FILE", help="records, as pissa finetune reads them")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every number there")
    return parser.parse_args()


def batches(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Those of each side."""
    padded = DataCollatorForLanguageModeling(pad_token_id=0)
    packed = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    parts = [[rows[i] for i in order[start : start + BATCH]] for start in range(0, len(rows), BATCH)]
    return {
        "padded": [padded(part) for part in parts],
        "packed": [packed([row]) for row in pack_dataset(Dataset.from_list(rows), ROW, "bfd")],
    }


def labelled(batch: dict[str, Any]) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def main() -> None:
    options = arguments()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = encode(read_chats(records(options.data)), tokenizer, ROW)[0][:EXAMPLES]
    sides = batches(rows)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    model: Any = pissa.wrap(base, r=16, init="lora", task_type="CAUSAL_LM").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def loss(batch: dict[str, Any]) -> torch.Tensor:
        found: torch.Tensor = model(**batch, use_cache=False).loss
        return found

    def train(side: str) -> float:
        """The seconds of one pass."""
        start = time.perf_counter()
        for batch in sides[side]:
            loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - start

    result: dict[str, Any] = {side: {"tokens": sum(map(labelled, sides[side]))} for side in sides}
    with torch.no_grad():
        for side, parts in sides.items():
            total = sum(float(loss(batch)) * labelled(batch) for batch in parts)
            result[side]["loss"] = total / result[side]["tokens"]
            result[side]["places"] = sum(batch["input_ids"].numel() for batch in parts)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(REPEATS):
        for side in sides:
            seconds[side].append(train(side))
    for side in sides:
        result[side] |= {"seconds": seconds[side], "rate": result[side]["tokens"] / statistics.median(seconds[side])}
    ratios = [before / after for before, after in zip(seconds["padded"], seconds["packed"], strict=True)]
    print(*(f"{side}: {numbers}" for side, numbers in result.items()), f"ratios {ratios}", sep="\n")
    if options.json:
        write(options.json, {"machine": machine(), "rows": [{"side": side} | result[side] for side in sides]})


if __name__ == "__main__":
    main()
