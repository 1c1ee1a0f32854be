"""Hyper-parameters of the paper, and what transformers and TRL call them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bench.experiments.evaluation.glue import TASKS


@dataclass(frozen=True)
class Preset:
    """A training as the paper describes it. The optimizer is AdamW."""

    rank: int
    alpha: int
    dropout: float
    targets: str
    """"all-linear", or "attention": the query, key and value layers."""
    batch: int
    """Examples in a step, over all processes and accumulated batches."""
    learning_rate: float
    schedule: str
    warm_up: float
    """Share of the steps."""
    weight_decay: float
    epochs: int
    rows: int | None
    """The first so many training examples; None for all."""
    max_length: int
    """Tokens."""
    bf16: bool
    """Computes in bfloat16 (autocast), on weights in float32."""


PAPER_NLG = Preset(
    rank=128,
    alpha=128,
    dropout=0.0,
    targets="all-linear",
    batch=128,
    learning_rate=2e-5,
    schedule="cosine",
    warm_up=0.03,
    weight_decay=0.0,
    epochs=1,
    rows=100_000,
    max_length=512,
    bf16=True,
)
"""Section 5 of the paper, tables 2 and 5; rank, length and bf16 are those of its authors' scripts. The loss is on
responses only. All methods have this rate."""


def _nlu(epochs: int, batch: int, learning_rate: float, alpha: int = 8) -> Preset:
    return Preset(
        rank=8,
        alpha=alpha,
        dropout=0.0,
        targets="attention",
        batch=batch,
        learning_rate=learning_rate,
        schedule="linear",
        warm_up=0.0,
        weight_decay=0.0,
        epochs=epochs,
        rows=None,
        max_length=128,
        bf16=False,
    )


PAPER_NLU: dict[str, dict[str, Preset]] = {
    "PiSSA": dict(
        zip(
            TASKS,
            (
                _nlu(5, 16, 5e-4),
                _nlu(20, 16, 3e-5),
                _nlu(20, 32, 2e-4),
                _nlu(20, 16, 1e-4),
                _nlu(10, 32, 1e-4, alpha=16),
                _nlu(10, 16, 1e-4),
                _nlu(50, 16, 1e-4),
                _nlu(20, 8, 3e-4),
            ),
            strict=True,
        )
    ),
    "LoRA, Kaiming start": dict(
        zip(
            TASKS,
            (
                _nlu(10, 32, 3e-4),
                _nlu(10, 32, 1e-4),
                _nlu(10, 32, 4e-4),
                _nlu(30, 32, 4e-4),
                _nlu(25, 32, 3e-4),
                _nlu(10, 16, 3e-4),
                _nlu(50, 32, 4e-4),
                _nlu(30, 16, 4e-4),
            ),
            strict=True,
        )
    ),
}
"""Appendix L and table 10 of the paper, by method and GLUE task: each method has rates of its own.

What the paper does not say is transformers' default: no warm-up, no decay, no dropout, 128 tokens (its run_glue.py),
float32. The paper says rank 8 on queries, keys and values, and 1.33 million parameters: those layers of
DeBERTa-v3-base have 0.44 million at rank 8; 1.33 million are rank 24 there, or rank 8 on all linear layers.
"""


def training_arguments(
    preset: Preset, output_dir: str, per_device: int, processes: int = 1, steps: int | None = None
) -> dict[str, Any]:
    """Keyword arguments of transformers' TrainingArguments; those of TRL's SFTConfig are `sft_arguments`.

    Args:
        preset: a training of the paper.
        output_dir: folder of checkpoints.
        per_device: examples that a process computes at once; the rest of the preset's batch is accumulated.
        processes: that share a batch, one for each GPU.
        steps: for a trial: so few steps instead of the epochs, and nothing else is different. With a warm-up the first
            step has a rate of 0.

    Raises:
        ValueError: the preset's batch is no multiple of per_device * processes.
    """
    at_once = per_device * processes
    if preset.batch % at_once:
        raise ValueError(
            f"per_device * processes is {at_once}; allowed: a divisor of the preset's batch of {preset.batch}"
        )
    return {
        "output_dir": output_dir,
        "learning_rate": preset.learning_rate,
        "lr_scheduler_type": preset.schedule,
        "warmup_steps": preset.warm_up,  # below 1: a share of the steps
        "weight_decay": preset.weight_decay,
        "num_train_epochs": preset.epochs,
        "max_steps": -1 if steps is None else steps,
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": preset.batch // at_once,
        "bf16": preset.bf16,
        "use_cpu": not torch.accelerator.is_available(),
        "report_to": "none",
    }


def sft_arguments(
    preset: Preset, output_dir: str, per_device: int, processes: int = 1, steps: int | None = None
) -> dict[str, Any]:
    """Keyword arguments of TRL's SFTConfig, for data with "prompt" and "completion": as `training_arguments`."""
    arguments = training_arguments(preset, output_dir, per_device, processes, steps)
    return {**arguments, "max_length": preset.max_length, "completion_only_loss": True}
