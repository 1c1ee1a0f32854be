"""Fine-tuning programs that build their PEFT model themselves: where they are installed, their data, their runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from language_models import logits
from pissa import PissaModel
from processes import TIMEOUT
from trainers import assert_equal

ROOT = Path(__file__).parents[3]
FOLDER = Path(os.environ.get("PISSA_PROGRAMS", ROOT / f"build/python3.{sys.version_info.minor}/programs"))
"""An environment for each program, made by `make test-programs`."""

WORDS = ("sun", "moon", "sea", "hill")
PAIRS = [(f"{one} {other}", f"{other} {one}") for one in WORDS for other in WORDS]
"""Prompts and answers, short enough for the tiny model's 64 tokens."""


ALONE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DO_NOT_TRACK": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
"""For every program: one thread, no GPU, no word to anybody."""

BY_WRAP = Path(__file__).with_name("by_wrap.py")
"""The other way to run a program."""


def python_of(program: str) -> Path:
    """The interpreter of a program's environment; skips the test where there is none."""
    python = FOLDER / program / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment for {program} in {FOLDER}: `make test-programs` makes it")
    return python


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write_chats(file: Path) -> Path:
    """Writes a JSONL file of conversations under the key `messages`, and returns it."""
    rows = ({"messages": [turn("user", prompt), turn("assistant", answer)]} for prompt, answer in PAIRS)
    return write_rows(file, rows)


def write_rows(file: Path, rows: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def write_yaml(file: Path, settings: Mapping[str, Any]) -> Path:
    """Writes a program's configuration, and returns the file."""
    file.write_text(yaml.safe_dump(dict(settings)))
    return file


def run(python: str | Path, *arguments: str | Path, cwd: Path, **variables: str) -> str:
    """Runs Python with these arguments in the folder `cwd`, and returns what it wrote.

    Raises:
        AssertionError: it failed; the message has the end of what it wrote.
        subprocess.TimeoutExpired: it hangs.
    """
    path = os.pathsep.join([str(Path(python).parent), os.environ["PATH"]])
    environment = os.environ | ALONE | {"PATH": path} | variables
    ended = subprocess.run(
        [python, *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=TIMEOUT,
    )
    assert ended.returncode == 0, ended.stdout[-6000:]
    return ended.stdout


def assert_runs_equal(ours: Path, by_wrap: Path) -> None:
    """Two folders of checkpoints hold the same losses and the same adapter, to the bit."""
    assert losses(ours) == losses(by_wrap)
    assert_equal(tensors(last_checkpoint(ours)), tensors(last_checkpoint(by_wrap)))


def assert_served_by_peft(adapter: Path, base: Path) -> None:
    """PEFT alone makes of the adapter what it was in training, and that is not the base."""
    from peft import PeftModel

    ids = torch.arange(1, 13)[None]
    ours = logits(PissaModel.from_pretrained(load(base), adapter).eval(), ids)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load(base), adapter).eval(), ids), ours)
    assert not torch.equal(ours, logits(load(base), ids))


def load(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tensors(folder: Path) -> dict[str, Tensor]:
    """The saved adapter: a plain LoRA."""
    return load_file(folder / "adapter_model.safetensors")


def losses(folder: Path) -> list[float]:
    """The losses that a trainer has noted beside its last checkpoint, step by step."""
    history = json.loads((last_checkpoint(folder) / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def last_checkpoint(folder: Path) -> Path:
    """The last of a trainer's checkpoints."""
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
