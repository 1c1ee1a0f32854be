"""ms-swift under `pissa run`: `init_weights: pissa` in its YAML file gives what `pissa.wrap` gives in it, to the bit.
It starts the training in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from programs import BY_WRAP, assert_runs_equal, assert_served_by_peft, python_of, run, write_chats, write_yaml
from tiny_model import save_tiny_model

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {
    "model": "tiny",
    "model_type": "llama",
    "template": "dummy",
    "tuner_type": "lora",
    "init_weights": "pissa_niter_16",
    "lora_rank": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": ["all-linear"],
    "dataset": ["chats.jsonl"],
    "split_dataset_ratio": 0,
    "max_length": 64,
    "torch_dtype": "float32",
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_steps": 3,
    "report_to": "none",
    "add_version": False,  # no sub-folder with the time in its name
    "seed": 7,
}


def test_init_weights(tmp_path: Path) -> None:
    python = python_of("ms-swift")
    base = save_tiny_model(tmp_path / "tiny")
    write_chats(tmp_path / "chats.jsonl")
    file = write_yaml(tmp_path / "run.yaml", SETTINGS | {"output_dir": "ours"})
    run(python, "-m", "pissa", "run", "--", "swift", "sft", file, cwd=tmp_path)
    fields = json.dumps({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"})
    run(python, BY_WRAP, fields, "swift.cli.sft", *flags(SETTINGS | {"output_dir": "by_wrap"}), cwd=tmp_path)
    assert_runs_equal(tmp_path / "ours", tmp_path / "by_wrap")
    assert_served_by_peft(tmp_path / "ours" / "checkpoint-3", base)
    # What it does about PEFT's PiSSA is not called for: the checkpoint is a plain LoRA already.
    assert not (tmp_path / "ours" / "initial_model").exists()


def flags(settings: dict[str, Any]) -> list[str]:
    """The settings as arguments: only its main program, which starts another, reads a YAML file."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in settings.items()}
    return [word for name, values in lists.items() for word in (f"--{name}", *map(str, values))]
