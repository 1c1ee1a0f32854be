"""Programs under `pissa run`: PiSSA in their own configuration gives what `pissa.wrap` gives in them, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from programs import (
    BY_WRAP,
    PAIRS,
    assert_runs_equal,
    assert_served_by_peft,
    last_checkpoint,
    python_of,
    run,
    tensors,
    write_chats,
    write_rows,
    write_yaml,
)
from tiny_model import save_tiny_model
from trainers import assert_equal

pytestmark = pytest.mark.slow

FIELDS = json.dumps({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"})
COMMON: dict[str, Any] = {
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_steps": 3,
    "seed": 7,
}
AXOLOTL: dict[str, Any] = {
    "base_model": "tiny",
    "model_type": "AutoModelForCausalLM",
    "tokenizer_type": "AutoTokenizer",
    "special_tokens": {"pad_token": "</s>"},
    "adapter": "lora",
    "peft_init_lora_weights": "pissa_niter_16",
    "lora_r": 4,
    "lora_target_linear": True,
    # Its fused kernels read lora_A and lora_B as a plain LoRA's. They are on unless the file says no to one of them.
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
    "lora_embedding_kernel": False,
    "datasets": [{"path": "chats.jsonl", "ds_type": "json", "type": "chat_template", "field_messages": "messages"}],
    "sequence_len": 64,
    "num_epochs": 1,
    "micro_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "optimizer": "adamw_torch",
    "lr_scheduler": "constant",
    "bf16": False,
    "fp16": False,
    "tf32": False,
}
LLAMAFACTORY: dict[str, Any] = {
    "model_name_or_path": "tiny",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "all",
    "pissa_init": True,
    "pissa_iter": 16,
    "pissa_convert": True,  # what its documentation asks for
    "dataset_dir": ".",
    "dataset": "chats",
    "template": "default",
    "cutoff_len": 64,
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "use_cpu": True,
}
MS_SWIFT: dict[str, Any] = {
    "model": "tiny",
    "model_type": "llama",
    "template": "dummy",
    "tuner_type": "lora",
    "init_weights": "pissa_niter_16",
    "lora_rank": 4,
    "target_modules": ["all-linear"],
    "dataset": ["chats.jsonl"],
    "split_dataset_ratio": 0,
    "max_length": 64,
    "torch_dtype": "float32",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "report_to": "none",
    "add_version": False,  # no sub-folder with the time in its name
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The model in the folder tiny, beside chats.jsonl."""
    write_chats(tmp_path / "chats.jsonl")
    return save_tiny_model(tmp_path / "tiny")


def both(program: str, command: list[str], module: list[str], folder: Path, **variables: str) -> Path:
    """Runs a command of the program under `pissa run`, and a module by wrap; OUT in either is the folder of the run.
    Returns the program's last checkpoint."""
    python = python_of(program)
    for out, words in (("ours", ["-m", "pissa", "run", "--", *command]), ("by_wrap", [str(BY_WRAP), FIELDS, *module])):
        run(python, *(word.replace("OUT", out) for word in words), cwd=folder, **variables)
    assert_runs_equal(folder / "ours", folder / "by_wrap")
    return last_checkpoint(folder / "ours")


def test_axolotl(base: Path, tmp_path: Path) -> None:
    """It starts the training by `accelerate launch`."""
    for out in ("ours", "by_wrap"):
        settings = COMMON | AXOLOTL | {"output_dir": out, "dataset_prepared_path": f"{out}-prepared"}
        write_yaml(tmp_path / f"{out}.yaml", settings)
    both("axolotl", ["axolotl", "train", "OUT.yaml"], ["axolotl.cli.train", "OUT.yaml"], tmp_path)
    assert_served_by_peft(tmp_path / "ours", base)


def test_llamafactory(base: Path, tmp_path: Path) -> None:
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    chats = {"file_name": "chats.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"chats": chats}))
    for out in ("ours", "by_wrap"):
        write_yaml(tmp_path / f"{out}.yaml", COMMON | LLAMAFACTORY | {"output_dir": out})
    command = ["llamafactory-cli", "train", "OUT.yaml"]
    # Its own switch: its release asks for an older PEFT than ours.
    both("llamafactory", command, ["llamafactory.launcher", "OUT.yaml"], tmp_path, DISABLE_VERSION_CHECK="1")
    assert_served_by_peft(tmp_path / "ours", base)
    for name in ("pissa_converted", "pissa_backup"):  # all three are the plain LoRA
        assert_equal(tensors(tmp_path / "ours" / name), tensors(tmp_path / "ours"))


def test_ms_swift(base: Path, tmp_path: Path) -> None:
    """It starts the training in a process of its own; only its main program, which does, reads a YAML file."""
    write_yaml(tmp_path / "ours.yaml", COMMON | MS_SWIFT | {"output_dir": "ours"})
    flags = []
    for name, value in (COMMON | MS_SWIFT | {"output_dir": "OUT"}).items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    checkpoint = both("ms-swift", ["swift", "sft", "OUT.yaml"], ["swift.cli.sft", *flags], tmp_path)
    assert_served_by_peft(checkpoint, base)
    # What it does about PEFT's PiSSA is not called for: the checkpoint is a plain LoRA already.
    assert not (tmp_path / "ours" / "initial_model").exists()


def test_unsloth(base: Path, tmp_path: Path) -> None:
    """`init_lora_weights="pissa"` in a script."""
    write_rows(tmp_path / "texts.jsonl", ({"text": f"{prompt}: {answer}"} for prompt, answer in PAIRS))
    script = [str(BY_WRAP.with_name("unsloth_script.py")), "tiny", "texts.jsonl", "OUT"]
    assert_served_by_peft(both("unsloth", script, script, tmp_path), base)
