"""Commands: what a refused one says; of `pissa finetune` and `pissa dpo` on small data, what is given to them, and what
they have logged."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from pissa.cli import main


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line, besides progress bars, of a command that ends with exit code 2."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" or arguments[0] in ("finetune", "dpo")  # which say what they have read until then
    [message] = [line for line in captured.err.splitlines() if line.startswith(f"pissa {arguments[0]}: ")]
    assert captured.err.endswith(f"{message}\n")
    return message


class Terminal(io.StringIO):
    """Lines that someone types."""

    def isatty(self) -> bool:
        return True


def save_sums(folder: Path, rows: int = 24) -> Path:
    """Writes questions with their answers, for `pissa finetune`, and returns the file. 4 steps of 4 rows end within an
    epoch."""
    return _save(folder / "sums.jsonl", [{"question": f"{i}+1", "answer": f"{i + 1}"} for i in range(rows)])


def save_preferences(folder: Path) -> Path:
    """Writes pairs of answers, for `pissa dpo`, and returns the file."""
    rows = [{"prompt": f"{i}+1", "chosen": f"{i + 1}", "rejected": "no"} for i in range(16)]
    return _save(folder / "preferences.jsonl", rows)


def _save(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(name: str, base: Path, data: Path, out: Path, *more: str, steps: int = 4) -> list[str]:
    """The arguments of a run with a checkpoint half way, without accumulation."""
    fixed = [name, "--model", str(base), "--data", str(data), "--out", str(out), "--lr", "1e-2", "--save-steps", "2"]
    return [*fixed, "--batch-size", "4", "--grad-accum", "1", "--steps", str(steps), *more]


def logged(out: Path, name: str = "loss") -> list[float]:
    """The numbers of a name that a run has logged, in their order."""
    return [row[name] for row in history(out) if name in row]


def history(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return rows


_MEASURED = ("seconds", "per_second", "runtime", "_mib", "num_tokens", "right")


def exact(out: Path) -> list[dict[str, Any]]:
    """What a run has logged of each step and evaluation, but for what depends on the machine's load, such as whether
    right answers are counted, and TRL's count of tokens, which begins anew where a run is resumed."""
    rows = [row for row in history(out) if "train_loss" not in row]
    return [{key: value for key, value in row.items() if not key.endswith(_MEASURED)} for row in rows]


WEIGHTS = "adapter_model.safetensors"


def cut_last_step(out: Path, last: int = 4) -> None:
    """Leaves of a run what a crash in its last step does: the checkpoint before, and one that was not finished."""
    for name in (WEIGHTS, "trainer_state.json", f"checkpoint-{last}/trainer_state.json"):
        (out / name).unlink()


def same_weights(*outs: Path) -> bool:
    """Whether runs have ended with the same adapter, byte for byte."""
    return len({(out / WEIGHTS).read_bytes() for out in outs}) == 1
