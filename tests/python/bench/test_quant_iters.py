"""bench.quant_iters: the sweep of rates, cells that are run once, and the starts that are compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench_tasks import tiny_task

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _bench_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


@pytest.mark.parametrize(
    ("best", "tried"),
    [(2.0, [1.0, 2.0, 4.0]), (16.0, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), (0.5, [0.25, 0.5, 1.0, 2.0, 4.0])],
)
def test_a_sweep_ends_with_a_rate_between_two_others(best: float, tried: list[float]) -> None:
    from bench.quant_iters.__main__ import sweep

    asked = []

    def loss(rate: float) -> float:
        asked.append(rate)
        return abs(rate - best)

    assert sweep((1.0, 2.0, 4.0), loss) == best
    assert sorted(asked) == tried


def test_cells_are_run_once_and_every_start_is_what_its_name_says(tmp_path: Path) -> None:
    from bench.quant_iters.__main__ import SEEDS, run, table
    from bench.quant_iters.cells import Cell
    from bench.quant_iters.starts import STARTS
    from bench.training.results import Results

    task, results = tiny_task(), Results(tmp_path / "results.jsonl", Cell)
    run(task, list(STARTS), results)
    models = task.started
    run(task, list(STARTS), results)
    again = Results(tmp_path / "results.jsonl", Cell)
    run(task, list(STARTS), again)
    assert task.started == models
    assert again.records == results.records
    cells = results.cells()
    for start in STARTS:
        rates = {cell.rate for cell in cells if cell.start == start and cell.seed == 0}
        assert rates >= set(task.rates)
        assert sorted(cell.seed for cell in cells if cell.start == start and cell.seed) == sorted(SEEDS)
    before = {cell.start: row["before"]["loss"] for cell, row in cells.items()}
    # The base's function, which decides the loss before training, has nothing to do with where the adapter starts.
    assert before["LoRA on T = 1"] == pytest.approx(before["T = 1"], abs=2e-5)
    assert before["LoRA on T = 5"] == pytest.approx(before["T = 5"], abs=2e-5)
    assert len({round(before[start], 4) for start in ("T = 1", "T = 5", "QLoRA")}) == 3
    (errors,) = (record for record in results.records if "errors_of" in record)
    assert errors["layers"] == 7
    for norm in ("frobenius", "nuclear"):
        assert 0 < errors["T = 5"][norm] < errors["T = 1"][norm] < 1
    lines = table(results).splitlines()
    assert sum(line.startswith("| tiny | T = 5 |") for line in lines) == len(
        {c.rate for c in cells if c.start == "T = 5"}
    )


def test_a_cell_gives_the_same_numbers_again(tmp_path: Path) -> None:
    from bench.quant_iters.cells import Cell, train

    first, second, other = (train(tiny_task(), Cell("tiny", "T = 1", 1e-3, seed)) for seed in (3, 3, 4))
    assert first["training_losses"] == second["training_losses"]
    assert first["after"] == second["after"]
    assert first["training_losses"] != other["training_losses"]
    assert first["before"] == other["before"]  # held-out batches and start are the same for all seeds
