"""axolotl under `pissa run`: `peft_init_lora_weights: pissa` in its YAML file gives what `pissa.wrap` gives in it, to
the bit. It starts the training by `accelerate launch`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from programs import BY_WRAP, assert_runs_equal, assert_served_by_peft, python_of, run, write_chats, write_yaml
from tiny_model import save_tiny_model

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {
    "base_model": "tiny",
    "model_type": "AutoModelForCausalLM",
    "tokenizer_type": "AutoTokenizer",
    "special_tokens": {"pad_token": "</s>"},
    "adapter": "lora",
    "peft_init_lora_weights": "pissa_niter_16",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_linear": True,
    # Its fused kernels read lora_A and lora_B as a plain LoRA's. They are on unless the file says no to one of them.
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
    "lora_embedding_kernel": False,
    "datasets": [{"path": "chats.jsonl", "ds_type": "json", "type": "chat_template", "field_messages": "messages"}],
    "sequence_len": 64,
    "max_steps": 3,
    "num_epochs": 1,
    "micro_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "optimizer": "adamw_torch",
    "learning_rate": 1e-3,
    "lr_scheduler": "constant",
    "logging_steps": 1,
    "save_steps": 3,
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "seed": 7,
}


def test_peft_init_lora_weights(tmp_path: Path) -> None:
    python = python_of("axolotl")
    base = save_tiny_model(tmp_path / "tiny")
    write_chats(tmp_path / "chats.jsonl")
    file = settings(tmp_path, "ours")
    run(python, "-m", "pissa", "run", "--", "axolotl", "train", file, cwd=tmp_path)
    fields = json.dumps({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"})
    run(python, BY_WRAP, fields, "axolotl.cli.train", settings(tmp_path, "by_wrap"), cwd=tmp_path)
    assert_runs_equal(tmp_path / "ours", tmp_path / "by_wrap")
    assert_served_by_peft(tmp_path / "ours", base)


def settings(folder: Path, output: str) -> Path:
    """The file of a run whose adapter goes to the folder `output`."""
    return write_yaml(
        folder / f"{output}.yaml", SETTINGS | {"output_dir": output, "dataset_prepared_path": f"{output}-prepared"}
    )
