"""bench.experiments: cells run once and in processes of their own, sweeps find the best rate, results are kept."""

from __future__ import annotations

import dataclasses
import json
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
