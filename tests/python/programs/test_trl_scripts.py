"""TRL's script `trl sft` under `pissa run --init pissa`: from a YAML file comes the adapter that
`pissa.wrap` gives in TRL's trainer, to the bit. It starts the training by `accelerate launch`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import pissa
from programs import assert_served_by_peft, load, losses, run, tensors, write_chats, write_yaml
from tiny_model import save_tiny_model
from trainers import TERMS, assert_equal, logged, quiet

pytestmark = [quiet, pytest.mark.nightly]  # cli/test_cli_run.py is the daily one

SETTINGS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_steps": 3,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "seed": 7,
}
"""Those of TRL's trainers. A script has the model, the data and the adapter from the same file."""

MODEL: dict[str, Any] = {"model_name_or_path": "tiny", "dtype": "float32", "use_peft": True}
LORA: dict[str, Any] = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}


def test_sft(tmp_path: Path) -> None:
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    base = save_tiny_model(tmp_path / "tiny")
    data = write_chats(tmp_path / "chats" / "train.jsonl")
    file = write_yaml(
        tmp_path / "sft.yaml", SETTINGS | MODEL | LORA | {"dataset_name": "chats", "output_dir": "by_script"}
    )
    run(sys.executable, "-m", "pissa", "run", "--init", "pissa", "--", "trl", "sft", "--config", file, cwd=tmp_path)
    config = SFTConfig(output_dir=str(tmp_path / "by_wrap"), **SETTINGS)
    dataset = load_dataset("json", data_files=str(data), split="train", cache_dir=str(tmp_path / "cache"))
    model = pissa.wrap(load(base), r=4, lora_alpha=8, task_type="CAUSAL_LM")
    trainer = SFTTrainer(model, config, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
    assert losses(tmp_path / "by_script") == logged(trainer)
    assert_equal(tensors(tmp_path / "by_script"), tensors(tmp_path / "by_wrap"))
    assert_served_by_peft(tmp_path / "by_script", base)


def test_qlora(tmp_path: Path) -> None:
    """`load_in_4bit` and a plain LoRA: our kernels train what bitsandbytes trains, up to roundings: those of sums, and
    one to bfloat16, to which TRL casts the adapter, of the fiftieth of the loss that an adapter adds at most here."""
    # On a CPU bitsandbytes 0.50.2 decodes a block wrongly that is longer than a row: rows of 64 at least.
    save_tiny_model(tmp_path / "tiny", hidden_size=64, intermediate_size=128)
    write_chats(tmp_path / "chats" / "train.jsonl")
    settings = SETTINGS | MODEL | LORA | {"dataset_name": "chats", "load_in_4bit": True}
    script = ("-m", "trl.scripts.sft", "--config")
    file = write_yaml(tmp_path / "ours.yaml", settings | {"output_dir": "ours"})
    said = run(sys.executable, "-m", "pissa", "run", "--", *script, file, cwd=tmp_path)
    assert "became LoRA with our kernels: rank 4, 14 layers, the quantised base as it is" in said
    run(sys.executable, *script, write_yaml(tmp_path / "peft.yaml", settings | {"output_dir": "peft"}), cwd=tmp_path)
    assert losses(tmp_path / "ours") == pytest.approx(losses(tmp_path / "peft"), rel=TERMS * 2**-24 + 2**-8 / 50)
