"""Types and style, as mypy and ruff see them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "command",
    [
        ["mypy", "--config-file", "pyproject.toml"],
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "python", "tests", "bench"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_types_and_style(command: list[str]) -> None:
    run = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
