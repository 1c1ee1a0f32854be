"""LLaMA-Factory under `pissa run`: `pissa_init` in its YAML file gives what `pissa.wrap` gives in it, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from programs import BY_WRAP, assert_runs_equal, assert_served_by_peft, python_of, run, tensors, write_chats, write_yaml
from tiny_model import save_tiny_model
from trainers import assert_equal

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {
    "model_name_or_path": "tiny",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target": "all",
    "pissa_init": True,
    "pissa_iter": 16,
    "pissa_convert": True,  # what its documentation asks for
    "dataset_dir": "data",
    "dataset": "chats",
    "template": "default",
    "cutoff_len": 64,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_steps": 3,
    "report_to": "none",
    "use_cpu": True,
    "seed": 7,
}
COLUMNS = {"messages": "messages"}
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
DATASETS = {"chats": {"file_name": "chats.jsonl", "formatting": "sharegpt", "columns": COLUMNS, "tags": TAGS}}

UNPINNED = {"DISABLE_VERSION_CHECK": "1"}
"""LLaMA-Factory's own switch: its release asks for an older PEFT than ours."""


def test_pissa_init(tmp_path: Path) -> None:
    python = python_of("llamafactory")
    base = save_tiny_model(tmp_path / "tiny")
    write_chats(tmp_path / "data" / "chats.jsonl")
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(DATASETS))
    file = write_yaml(tmp_path / "run.yaml", SETTINGS | {"output_dir": "ours"})
    run(python, "-m", "pissa", "run", "--", "llamafactory-cli", "train", file, cwd=tmp_path, **UNPINNED)
    file = write_yaml(tmp_path / "wrap.yaml", SETTINGS | {"output_dir": "by_wrap"})
    fields = json.dumps({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"})
    run(python, BY_WRAP, fields, "llamafactory.launcher", file, cwd=tmp_path, **UNPINNED)
    assert_runs_equal(tmp_path / "ours", tmp_path / "by_wrap")
    assert_served_by_peft(tmp_path / "ours", base)
    for name in ("pissa_converted", "pissa_backup"):  # all three are the plain LoRA
        assert_equal(tensors(tmp_path / "ours" / name), tensors(tmp_path / "ours"))
