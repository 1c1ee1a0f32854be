"""bench.suggest_lr: cells and suggestions that are made once, from one start."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bench_tasks import tiny_task

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _bench_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def test_seven_rates_lie_around_the_centre_which_comes_first() -> None:
    from bench.suggest_lr.cells import METHODS, RANKS, rates

    for method in METHODS:
        for rank in RANKS:
            found = rates(method, rank)
            ordered = sorted(found)
            assert found[0] == ordered[3]
            assert set(found[:3]) == set(ordered[2:5])
            assert all(2 <= b / a <= 2.5 + 1e-9 for a, b in pairwise(ordered))
            assert len(found) == 7


def test_cells_and_suggestions_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.suggest_lr import __main__ as program
    from bench.suggest_lr.cells import Cell
    from bench.training.results import Results

    monkeypatch.setattr(program, "RANKS", (4,))
    file = tmp_path / "results.jsonl"
    task, results = tiny_task(), Results(file, Cell)
    program.sweep([task], results)
    program.suggest_all([task], results)
    assert len(results.cells()) == 16
    started = task.started
    lines = file.read_text().splitlines()
    file.write_text(
        "\n".join(lines[:-3]) + "\n"
    )  # interrupted: a cell of PiSSA, a suggestion for LoRA and its cell are not there yet
    again = Results(file, Cell)
    program.sweep([task], again)
    program.suggest_all([task], again)
    assert task.started == started + 2
    made = [json.loads(line) for line in lines]
    for new, old in zip(again.records, made, strict=True):
        assert new | {"seconds": 0} == old | {"seconds": 0}
    assert all(row["before"] == made[0]["before"] for row in again.cells().values())
    table = program.table(again)
    assert len(table.splitlines()) == 4
    for (name, method, rank), rate in program.suggestions(again).items():
        assert f"| {name} | {method}, {rank} | " in table
        assert f" at {rate:g} | " in table


def test_a_start_is_put_back() -> None:
    from bench.suggest_lr.cells import Cell, Start, train

    task = tiny_task()
    start = Start(task.model(), "pissa", 4, task.task_type)
    first = train(task, start, Cell("tiny", "pissa", 4, 1e-2, 0))
    again = train(task, start, Cell("tiny", "pissa", 4, 1e-2, 0))
    fresh = train(task, Start(task.model(), "pissa", 4, task.task_type), Cell("tiny", "pissa", 4, 1e-2, 0))
    assert first["training_losses"] == again["training_losses"] == fresh["training_losses"]
    assert first["after"] == again["after"] != first["before"]
    assert all(torch.equal(p, torch.zeros_like(p)) for p in start.reset().parameters() if p.requires_grad)
