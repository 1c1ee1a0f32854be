"""`pissa start`: its questions, and what it proposes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from pissa.cli import guide, main, memory
from runs import Terminal, logged, refused


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """Runs the command in a terminal where these answers are given."""

    def run(answers: list[str]) -> int:
        given = iter(answers)
        monkeypatch.setattr("sys.stdin", Terminal())
        monkeypatch.setattr("builtins.input", lambda question: next(given))
        return main(["start"])

    return run


def test_three_answers_make_a_training(
    base: Path,
    data: Path,
    tmp_path: Path,
    asked: Callable[[list[str]], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert asked(["no-model", str(base), "", "no.csv", str(data), "soon", "0", "5", "maybe", "yes"]) == 0
    said = capsys.readouterr().out
    assert f"\npissa finetune --model {base} --minutes 5 --data {data} --rank 16 --epochs 3\n" in said
    for problem in (
        "no-model",
        "a file is needed",
        "no such file",
        "got 'soon'; allowed: a number of minutes",
        "got '0'; allowed",
        "allowed: yes or no",
    ):
        assert f"{problem}" in said
    assert len(logged(tmp_path / f"{base.name}-{data.stem}")) == 9  # 24 examples, 8 a step, three times


def test_nothing_is_run_unasked(
    base: Path, data: Path, tmp_path: Path, asked: Callable[[list[str]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert asked([str(base), str(data), "", "no"]) == 0
    assert list(tmp_path.glob("*/run.yaml")) == []


def test_it_needs_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for stdin in (io.StringIO("text"), None):  # Python has none if it was closed before the start
        monkeypatch.setattr("sys.stdin", stdin)
        assert "without it: pissa finetune --model MODEL --data FILE" in refused(["start"], capsys)


@pytest.mark.parametrize(("examples", "passes"), [(500, "1"), (200, "2"), (199, "3")])
def test_few_examples_are_seen_more_often(examples: int, passes: str, tmp_path: Path) -> None:
    path = tmp_path / "sums.csv"
    path.write_text("question,answer\n" + "1+1,2\n" * examples)
    rest = ["--rank", "16", "--epochs", passes]
    assert guide._read(str(path)) == ["--data", str(path), *rest]
    path.write_text("frage;antwort\n" + "1+1;2\n" * examples)
    mapping = "question=frage,answer=antwort"
    assert guide._read(f"{path} --columns {mapping}") == ["--data", str(path), "--columns", mapping, *rest]


def test_large_weights_are_proposed_in_4_bits(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (base / "model.safetensors").stat().st_size
    for free, expected in ((10 * size, []), (size, ["--quant", "nf4", "--calibrate"])):
        monkeypatch.setattr(memory, "free_memory", lambda free=free: free)
        assert guide._open_model(str(base)) == expected
