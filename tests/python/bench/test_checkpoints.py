"""bench.checkpoints: what a process takes, and the table."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[3]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _bench_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


MEMORY = """
import mmap, sys, time
private = bytearray(b"1") * (200 << 20)
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
    pages = sum(mapped[i] for i in range(0, len(mapped), 4096))
    time.sleep(0.2)
"""


def test_private_and_mapped_memory_are_told_apart(tmp_path: Path) -> None:
    from bench.checkpoints.processes import run

    (tmp_path / "file").write_bytes(bytes(100 * MIB))
    usage = run([sys.executable, "-c", MEMORY, str(tmp_path / "file")], os.environ, tmp_path)
    assert 200 * MIB <= usage.private < 250 * MIB
    assert 100 * MIB <= usage.mapped < 150 * MIB
    assert 300 * MIB <= usage.together <= usage.private + usage.mapped
    assert usage.seconds >= 0.2
    assert usage.samples >= 5


def test_a_program_that_fails_or_hangs_is_named_with_its_last_words(tmp_path: Path) -> None:
    from bench.checkpoints.processes import FailedError, run

    with pytest.raises(FailedError, match=r"exit status 3; the end of its output:\nlast words\nerror"):
        run(
            [
                sys.executable,
                "-c",
                "import sys; print('last words'); print('error', file=sys.stderr); raise SystemExit(3)",
            ],
            os.environ,
            tmp_path,
        )
    with pytest.raises(FailedError, match=r"longer than 0\.2 s"):
        run([sys.executable, "-c", "import time; time.sleep(60)"], os.environ, tmp_path, timeout=0.2)


def test_imports_are_timed_apart_wherever_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.checkpoints.processes import run_module

    (tmp_path / "slow.py").write_text("import time; time.sleep(0.3); import inner")
    (tmp_path / "inner.py").write_text("import time; time.sleep(0.2)")
    program = (
        "import sys, time, importlib\nfrom bench.checkpoints.timed import note\n"
        "def late():\n    import slow\nlate()\ntime.sleep(0.25)\n"
        "note(arguments=sys.argv[1:])\nif __name__ == '__main__':\n    sys.exit(0)\n"
    )
    (tmp_path / "program.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = run_module("program", "a", 1, threads=1).report
    assert report["arguments"] == ["a", "1"]
    assert 0.5 <= report["imports"] < report["seconds"] - 0.25  # 0.3 and 0.2, and not twice


def test_the_products_of_a_step_are_counted() -> None:
    from bench.checkpoints.step import DenseProducts

    products = DenseProducts(Counter({(4, 8): 2, (16, 4): 1}), 3, (32, 4), tokens=5)
    inside = 3 * (2 * 4 * 8 + 16 * 4)  # three products with each weight of a layer, of which there are three
    assert products.flops() == 2 * 5 * (3 * inside + 2 * 32 * 4)
    assert products.seconds(2) > 0


USAGE = {
    "seconds": 10.0,
    "own_seconds": 8.0,
    "private": 1e9,
    "mapped": 3e9,
    "together": 4e9,
    "report": {"imports": 2.0, "seconds": 9.0, "load": 1.0, "steps": [1.0]},
    "parameters": 8e9,
    "split_parameters": 4e9,
    "gb_per_second": 2.0,
    "ns_per_parameter": 1.0,
    "ns_per_split_parameter": 2.0,
}
SEVEN = {
    **USAGE,
    "cold": USAGE,
    "copy_cold": {"copied": 1.0, "on_disk": 2.0},
    "copy_warm": {"copied": 1.0, "on_disk": 2.0},
    "kernels": {"total": 5.0, "gb_per_second": 1.0},
}


def test_the_table_says_what_was_met(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench.checkpoints.__main__ import main
    from bench.checkpoints.rows import ROWS

    step = {**USAGE, "beside_dense": {"steps": [9.0, 2.0, 2.0], "flops": 1e12}}
    pair = {"ours": USAGE, "peer": {**USAGE, "seconds": 100.0}}
    results = {
        "peer": {"pairs": [pair], "ratio": 0.1, "ratio_without_imports": 0.08},
        "3b": {**USAGE, "private": 1.7e9},
        "7b": {**SEVEN, "cold": {**USAGE, "private": 2.5e9}},
        "step": {**step, "share_of_dense_rate": 0.84},
        "nf4": {"difference": 0.01, "loss": 6.0, "plain_loss": 6.0, "difference_in_evaluation": 0.1},
        "int8": {"difference": 0.01, "loss": 6.0, "plain_loss": 6.03, "difference_in_evaluation": 0.1},
    }
    path = tmp_path / "results.json"
    path.write_text(json.dumps({name: {"result": result} for name, result in results.items()}))
    assert main(["--table", "--results", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {row.what: line.split("|")[-2].strip() for row in ROWS.values() for line in lines if row.what in line}
    missed = {ROWS[name].what for name in ("3b", "step", "nf4")}
    assert set(found) == {ROWS[name].what for name in results}
    assert {what for what, met in found.items() if met == "missed"} == missed
    assert "| 7b | 8000 M | 8.0 | 1.00 | 2.00 | 2.00 | 1.00 | 3.00 |" in lines


def test_a_row_that_fails_leaves_the_others_and_the_status_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.checkpoints import __main__ as program
    from bench.checkpoints import rows

    good = rows.Row("good", "goal", lambda options: {"work": str(options.work)}, lambda result: True, str)
    bad = rows.Row("bad", "goal", lambda options: {"x": 1 / 0}, lambda result: True, str)
    monkeypatch.setattr(program, "ROWS", {"bad": bad, "good": good})
    results = tmp_path / "results.json"
    code = program.main(["--work", str(tmp_path), "--rows", "bad", "good", "--results", str(results)])
    shown = capsys.readouterr()
    assert code == 1
    assert "bad: ZeroDivisionError" in shown.err
    assert "| good | goal |" in shown.out
    stored = json.loads(results.read_text())
    assert list(stored) == ["good"]
    assert stored["good"]["machine"]["threads"] == 2
    assert not Path(stored["good"]["result"]["work"]).exists()


def test_the_rate_of_the_kernels_counts_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.checkpoints import kernels, timed

    monkeypatch.setattr(timed, "REPORT", {})
    monkeypatch.setattr(sys, "argv", ["kernels", "--shape", "tiny", "--repeats", "1"])
    kernels.main()
    found = timed.REPORT
    # Of each of two layers: q and o, k and v, gate and up, down.
    assert {shape: one["count"] for shape, one in found["weights"].items()} == {
        "64x64": 4,
        "32x64": 4,
        "128x64": 4,
        "64x128": 2,
    }
    assert found["elements"] == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    assert found["total"] == pytest.approx(sum(one["count"] * one["each"] for one in found["weights"].values()))
