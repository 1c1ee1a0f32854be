"""The book's table of what was tested."""

from __future__ import annotations

import sys

import torch

import versions

OLD = "| 3.9.1 | 2.10.0 |"
NEW = "| 3.10.2 | 2.11.0 |"


def test_a_row_takes_the_place_of_its_python_s() -> None:
    text = f"before\n{versions.BEGIN}\n{versions.END}\nafter\n"
    both = versions.with_row(versions.with_row(text, NEW), OLD)
    assert both == "\n".join(["before", versions.BEGIN, "", versions.HEAD, OLD, NEW, "", versions.END, "after", ""])
    assert versions.with_row(both, OLD) == both
    assert versions.with_row(both, "| 3.10.9 | 2.12.0 |") == both.replace(NEW, "| 3.10.9 | 2.12.0 |")


def test_the_row_is_of_this_environment_and_fits_the_page() -> None:
    row = versions.row("make test")
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[0] == ".".join(map(str, sys.version_info[:3]))
    assert cells[1] == str(torch.__version__).split("+")[0]
    assert cells[-1] == "`make test`"
    assert len(cells) == versions.HEAD.splitlines()[0].count("|") - 1
    assert row in versions.with_row(versions.PAGE.read_text(), row)
