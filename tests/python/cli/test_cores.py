"""The number of threads: as many as other programs leave cores free, unless the user has given it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pissa.cli import main
from pissa.cli.cores import Threads
from runs import command


class Machine:
    """Eight cores, with as many threads of torch as are set. After `work`, that much time has passed, in which other
    programs kept so many cores busy."""

    def __init__(self) -> None:
        self.threads, self.read = 8, (0.0, 0.0, 0.0)

    def work(self, others: float, seconds: float = 10.0, own: float = 2.0) -> None:
        now, busy, ours = self.read
        self.read = now + seconds, busy + (others + own) * seconds, ours + own * seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: machine.threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: setattr(machine, "threads", number))
    monkeypatch.setattr(Threads, "_read", lambda self: machine.read)
    return machine


def test_as_many_threads_compute_as_cores_are_free(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    threads = Threads()
    for others, expected in ((0.3, 8), (2.9, 5), (7.9, 1), (7.4, 1), (3.1, 5), (0.0, 8)):
        machine.work(others)
        threads.choose()
        assert machine.threads == expected
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        "cores     other programs use 2.9 of 8 cores: 5 threads [P096]",
        "cores     other programs use 7.9 of 8 cores: 1 thread [P096]",
    ]
    assert len(said) == 4  # those that differ from the one before


def test_what_leaves_cores_over_changes_nothing(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.threads = 4  # torch's default with two threads a core
    threads = Threads()
    machine.work(4.2)
    threads.choose()
    assert (machine.threads, capsys.readouterr().out) == (4, "")


@pytest.mark.parametrize("way", ["argument", "variable", "several processes", "too short"])
def test_a_number_that_is_given_stays(way: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "variable":
        monkeypatch.setenv("OMP_NUM_THREADS", "8")
    threads = Threads(6 if way == "argument" else None, way != "several processes")
    machine.work(7.0, seconds=0.1 if way == "too short" else 10.0)
    threads.choose()
    assert machine.threads == (6 if way == "argument" else 8)


def test_commands_choose(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training before it loads the model, before its plan, and after each evaluation; a chat once it has loaded."""
    given, chosen = [], []
    monkeypatch.setattr(Threads, "__init__", lambda self, number, *_: given.append(number))
    monkeypatch.setattr(Threads, "choose", lambda self: chosen.append(self))
    arguments = command("finetune", base, data, tmp_path / "run", "--eval-data", str(data), "--threads", "3")
    assert main(arguments) == 0
    assert len(chosen) == 2 + 5
    assert main(["chat", str(tmp_path / "run"), "--prompt", "1+1", "--max-tokens", "2", "--threads", "2"]) == 0
    assert len(chosen) == 2 + 5 + 1
    assert given == [3, 2]
