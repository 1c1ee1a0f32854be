"""bench.checkpoints: what a process takes, and the table."""

from __future__ import annotations

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


def test_the_products_of_a_step_are_counted() -> None:
    from bench.checkpoints.step import DenseProducts

    products = DenseProducts(Counter({(4, 8): 2, (16, 4): 1}), 3, (32, 4), tokens=5)
    inside = 3 * (2 * 4 * 8 + 16 * 4)  # three products with each weight of a layer, of which there are three
    assert products.flops() == 2 * 5 * (3 * inside + 2 * 32 * 4)
    assert products.seconds(2) > 0


def test_the_committed_results_make_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    from bench.checkpoints.__main__ import main
    from bench.checkpoints.rows import ROWS

    assert main(["--table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {name: line.split("|")[-2].strip() for name, row in ROWS.items() for line in lines if row.what in line}
    assert found["peer"] == "missed"  # 0.595 of the peer's time, where a fifth was wanted
    assert {found[name] for name in ("3b", "7b")} == {"met"}
    assert "| 7b | 6738 M | 29.6 | 4.39 | 4.57 | 0.46 | 0.37 | 0.36 |" in lines
