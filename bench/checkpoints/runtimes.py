"""Compares a checkpoint of `pissa init` in plain transformers, bitsandbytes and PEFT with `pissa.load` of it.

    python -m bench.checkpoints.runtimes OUT

The report contains the largest difference of logits, as a share of the largest logit, and the loss of both. On a CPU
bitsandbytes computes with 4-bit weights in the dtype of the input while a model is in training mode, but in bf16 in
evaluation mode. Both of its modes are therefore compared. (These models have no dropout.)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.checkpoints.timed import note

TEXTS = (
    "Natalia sold 48 clips in April, and half as many in May. How many did she sell in April and May together?",
    "Water boils at a lower temperature on a mountain, because the pressure of the air is lower there.",
    "def area(width, height):\n    return width * height\n\n\nprint(area(3, 4))",
    "The committee met on Tuesday to decide which of the three proposals should be built first.",
)


@torch.no_grad()
def logits_and_loss(model: Any, batches: list[Tensor]) -> tuple[list[Tensor], float]:
    """The logits of each batch, float32, and the mean loss of all tokens."""
    outputs = [model(input_ids=tokens, labels=tokens) for tokens in batches]
    counts = [tokens.shape[1] - 1 for tokens in batches]
    loss = sum(float(output.loss) * count for output, count in zip(outputs, counts, strict=True)) / sum(counts)
    return [output.logits.float() for output in outputs], loss


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoints.runtimes", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import pissa

    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    batches = [tokenizer(text, return_tensors="pt").input_ids for text in TEXTS]
    base = AutoModelForCausalLM.from_pretrained(options.folder, dtype=options.dtype)
    plain = PeftModel.from_pretrained(base, options.folder / "pissa_init")
    trained, _ = logits_and_loss(plain.train(), batches)
    evaluated, plain_loss = logits_and_loss(plain.eval(), batches)
    del base, plain
    ours, loss = logits_and_loss(pissa.load(options.folder).eval(), batches)
    largest = max(float(logits.abs().max()) for logits in ours)
    in_training, in_evaluation = (
        max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / largest
        for theirs in (trained, evaluated)
    )
    note(difference=in_training, difference_in_evaluation=in_evaluation, loss=loss, plain_loss=plain_loss)


if __name__ == "__main__":
    main()
