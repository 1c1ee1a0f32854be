"""Unsloth under `pissa run`: `init_lora_weights="pissa"` in a script gives what `pissa.wrap` gives, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from programs import BY_WRAP, PAIRS, assert_runs_equal, assert_served_by_peft, python_of, run, write_rows
from tiny_model import save_tiny_model

pytestmark = pytest.mark.slow

SCRIPT = BY_WRAP.with_name("unsloth_script.py")


def test_init_lora_weights(tmp_path: Path) -> None:
    python = python_of("unsloth")
    base = save_tiny_model(tmp_path / "tiny")
    write_rows(tmp_path / "texts.jsonl", ({"text": f"{prompt}: {answer}"} for prompt, answer in PAIRS))
    run(python, "-m", "pissa", "run", "--", SCRIPT, "tiny", "texts.jsonl", "ours", cwd=tmp_path)
    fields = json.dumps({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"})
    run(python, BY_WRAP, fields, SCRIPT, "tiny", "texts.jsonl", "by_wrap", cwd=tmp_path)
    assert_runs_equal(tmp_path / "ours", tmp_path / "by_wrap")
    assert_served_by_peft(tmp_path / "ours" / "checkpoint-3", base)
