"""The book's table of what was tested."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

import versions

PAGE = Path(__file__).parents[3] / "docs" / "install.md"


def test_the_row_is_of_this_environment_and_fits_the_page() -> None:
    row = versions.row("make test")
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[0] == ".".join(map(str, sys.version_info[:3]))
    assert cells[1] == str(torch.__version__).split("+")[0]
    assert cells[-1] == "`make test`"
    table = re.findall(r"^\|.*", PAGE.read_text().partition("\n## What was tested\n")[2], flags=re.MULTILINE)
    assert len(table) > 2
    assert {line.count("|") for line in [*table, row]} == {len(cells) + 1}
