"""bench.experiments: cells run once and in processes of their own, sweeps find the best rate, results are kept."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _bench_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def toy() -> Any:
    """A class of cells: `what` says what `run` does, as Python."""
    from bench.experiments.experiment import Cell

    @dataclass(frozen=True)
    class Toy(Cell):
        kind: ClassVar[str] = "toy"
        what: str
        rate: float = 0.0
        seed: int = 0

        def run(self, options: Any) -> dict[str, Any]:
            found: dict[str, Any] = {}
            exec(self.what, {"found": found, "self": self})
            return found

    return Toy


def run_all(wanted: Callable[[Any], list[Any]], folder: Path, jobs: int = 2) -> tuple[Any, list[Any]]:
    from bench.experiments.experiment import Options
    from bench.experiments.results import Results
    from bench.experiments.run import run

    results = Results(folder)
    return results, run(lambda: wanted(results), results, Options(), jobs)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "toy.jsonl").read_text().splitlines()]


def test_a_cell_runs_once_and_in_a_process_of_its_own(tmp_path: Path) -> None:
    cells = [toy()("import os; found['process'] = os.getpid()", rate=rate) for rate in (1.0, 2.0, 3.0)]
    results, failed = run_all(lambda known: cells, tmp_path)
    assert failed == []
    processes = {results[cell]["process"] for cell in cells}
    assert len(processes) == 3
    assert os.getpid() not in processes
    before = lines(tmp_path)
    again, _ = run_all(lambda known: cells, tmp_path)
    assert lines(tmp_path) == before
    assert [again[cell] for cell in cells] == [results[cell] for cell in cells]
    record = again.record(cells[0])
    assert record["cell"] == dataclasses.asdict(cells[0])
    assert record.keys() == {"cell", "result", "seconds", "machine", "packages", "sources"}
    assert record["packages"]["torch"]
    assert record["seconds"].keys() == {"wall", "processor"}
    assert record["result"]["peak_memory_mib"] > 10


def test_without_git_the_sources_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.experiments.results import sources

    monkeypatch.setenv("PATH", "")
    assert sources.__wrapped__() == "unknown"


def test_a_cell_that_fails_or_is_killed_is_named_and_the_others_go_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = [toy()("raise ValueError('no data')"), toy()("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")]
    good = [toy()("found['x'] = 1", rate=rate) for rate in (1.0, 2.0)]
    results, failed = run_all(lambda known: [*bad, *good], tmp_path)
    assert sorted(failed, key=str) == sorted(bad, key=str)
    assert all(cell in results for cell in good)
    assert len(lines(tmp_path)) == 2
    error = capfd.readouterr().err
    assert "ValueError: no data" in error
    assert error.count("failed: ") == 2


def test_cells_that_follow_from_results_are_asked_for_again(tmp_path: Path) -> None:
    first, second = toy()("found['x'] = 1"), toy()("found['x'] = 2")
    results, _ = run_all(lambda known: [first, second] if first in known else [first], tmp_path)
    assert results[second]["x"] == 2


def test_ending_the_program_ends_its_cells_and_keeps_the_finished_ones(tmp_path: Path) -> None:
    program = textwrap.dedent(f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
        from test_experiment_harness import run_all, toy
        from pathlib import Path
        slow = "import os, time; open({str(tmp_path / "child")!r}, 'w').write(str(os.getpid())); time.sleep(60)"
        run_all(lambda known: [toy()("found['x'] = 1"), toy()(slow)], Path({str(tmp_path)!r}), jobs=1)
    """)
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    child = tmp_path / "child"
    while not (child.exists() and child.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "the others are run next time" in process.communicate(timeout=30)[1]
    assert process.returncode == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(child.read_text()), 0)
    assert [line["result"]["x"] for line in lines(tmp_path)] == [1]


def test_a_damaged_line_is_refused_by_file_and_line(tmp_path: Path) -> None:
    from bench.experiments.results import Results

    run_all(lambda known: [toy()("found['x'] = 1")], tmp_path)
    with (tmp_path / "toy.jsonl").open("a") as file:
        file.write('{"cell": {"what"')
    with pytest.raises(SystemExit, match=r"toy.jsonl, line 2: no record of a cell .* delete it"):
        Results(tmp_path)


# ---- Sweeps ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    rate: float
    seed: int = 0
    kind: ClassVar[str] = "trained"

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def swept(loss: Callable[[float, int], float | None], middle: float, **fields: Any) -> tuple[Any, Any]:
    """A sweep that has run to its end, and what is known after it."""
    from bench.experiments.experiment import Known
    from bench.experiments.sweep import Sweep

    sweep, known = Sweep(Trained(middle), **fields), Known()
    for _ in range(30):
        missing = [cell for cell in sweep.wanted(known) if cell not in known]
        if not missing:
            return sweep, known
        cell = missing[0]
        record = {"cell": dataclasses.asdict(cell), "result": {"after": {"loss": loss(cell.rate, cell.seed)}}}
        known.put("trained", record)
    raise AssertionError("the sweep has no end")


def valley(best: float) -> Callable[[float, int], float]:
    """Loss 1 at `best`, 1 + d squared at d decades from it."""
    return lambda rate, seed: 1 + math.log10(rate / best) ** 2 + 0.01 * seed


def test_five_rates_and_two_seeds_at_the_best() -> None:
    sweep, known = swept(valley(1e-3), 1e-3)
    assert list(sweep.losses(known)) == pytest.approx([2e-4, 5e-4, 1e-3, 2e-3, 5e-3])
    assert sweep.best(known) == pytest.approx(1e-3)
    assert len(known) == 7
    assert [result["after"]["loss"] for result in sweep.at_best(known)] == pytest.approx([1.0, 1.01, 1.02])


@pytest.mark.parametrize("best", [1e-5, 5e-4, 1e-2, 0.1])
def test_an_end_is_never_the_best(best: float) -> None:
    sweep, known = swept(valley(best), 1e-3)
    losses = list(sweep.losses(known))
    assert sweep.best(known) == pytest.approx(best)
    assert losses[0] < best < losses[-1]


def test_the_best_is_not_known_before_the_sweep_is_done() -> None:
    from bench.experiments.experiment import Known
    from bench.experiments.sweep import Sweep

    sweep, known = swept(valley(5e-3), 1e-3)
    fewer = Known()
    for cell in sweep.wanted(known)[:5]:
        fewer.put("trained", known.record(cell))
    assert Sweep(Trained(1e-3)).best(fewer) is None  # 5e-3 is the end of these
    assert sweep.at_best(fewer) == []


def test_a_training_that_diverged_is_not_the_best() -> None:
    sweep, known = swept(lambda rate, seed: None if rate > 6e-4 else 2 + rate, 1e-3)
    assert max(sweep.losses(known).values()) == math.inf
    assert sweep.best(known) < 6e-4


def test_the_width_of_a_valley_is_between_its_crossings() -> None:
    sweep, known = swept(valley(1e-3), 1e-3)
    # On the grid's straight lines: from 1 at d = 0 to 1 + 0.3010^2 at 2e-3 and 1 + 0.3010^2 at 5e-4.
    slope = math.log10(2)  # the loss rises by d squared over d decades
    assert sweep.width(known) == pytest.approx(2 * 0.02 / slope)
    assert sweep.bounded(known)
    flat, known = swept(lambda rate, seed: valley(1e-3)(rate, seed) / 100 + 1, 1e-3)
    assert flat.width(known) == pytest.approx(math.log10(5e-3 / 2e-4))
    assert not flat.bounded(known)


def test_a_spread_has_the_deviation_of_its_seeds() -> None:
    from bench.experiments.sweep import spread

    found = spread([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    assert found.deviation == pytest.approx(math.sqrt((16 / 9 + 1 / 9 + 25 / 9) / 2))
    assert found.error == pytest.approx(found.deviation / math.sqrt(3))
