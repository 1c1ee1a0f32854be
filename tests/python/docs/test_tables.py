"""What README and the book say of speed and of PEFT is what was measured and run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _bench_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def test_tables_are_those_of_the_committed_results() -> None:
    from bench.compare.page import PAGES, written

    for page in PAGES:
        assert written(page.read_text()) == page.read_text(), f"{page}: run `python -m bench.compare.page`"


@pytest.mark.nightly
def test_the_situations_are_still_wrong_in_peft_and_right_here() -> None:
    program = [sys.executable, str(ROOT / "docs" / "situations.py"), "--check"]
    found = subprocess.run(program, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
