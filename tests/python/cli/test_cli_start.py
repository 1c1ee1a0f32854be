"""`pissa start`: its questions, and what it proposes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pissa.cli import guide, main, memory
from pissa.cli.guide import Model, proposal
from runs import logged, refused

SMALL = Model(10**8, 2 * 10**8, True, None)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """Runs the command in a terminal where these answers are given."""

    def run(answers: list[str]) -> int:
        given = iter(answers)
        monkeypatch.setattr("sys.stdin", Terminal())
        monkeypatch.setattr("builtins.input", lambda question: next(given))
        return main(["start"])

    return run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


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
    assert f"\npissa finetune --model {base} --data {data} --rank 16 --epochs 3\n" in said
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
    monkeypatch.setattr("sys.stdin", io.StringIO("text"))
    assert "without it: pissa finetune --model MODEL --data FILE" in refused(["start"], capsys)


@pytest.mark.parametrize(
    ("examples", "minutes", "expected"),
    [
        (1000, 40, ["--epochs", "1"]),
        (300, 40, ["--epochs", "2"]),
        (100, 40, ["--epochs", "3"]),
        (300, 8, ["--epochs", "1"]),
        (1000, 8, ["--steps", "60"]),
    ],
)
def test_the_proposal_fits_the_time(
    examples: int, minutes: float, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 160 G operations a second, 0.1 G parameters train 200 tokens a second: one example."""
    monkeypatch.setattr(memory, "free_memory", lambda: 10**9)
    options = proposal(SMALL, [200] * examples, minutes, 160e9)
    assert options == ["--rank", "16", *expected]


def test_large_weights_are_proposed_in_4_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 10**9)
    large: Any = SMALL._replace(nbytes=6 * 10**8)
    assert proposal(large, [200] * 1000, 60, 1e12)[-3:] == ["--quant", "nf4", "--calibrate"]
    assert "--quant" not in proposal(large._replace(is_dense=False), [200] * 1000, 60, 1e12)


def test_the_rate_is_that_of_this_machine() -> None:
    assert 1e8 < guide._rate() < 1e14
