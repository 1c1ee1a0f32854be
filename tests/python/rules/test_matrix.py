"""The README's table of architectures is what the code does."""

from __future__ import annotations

import difflib

import pytest

import matrix
import trainers
from architectures import ARCHITECTURES

pytestmark = [pytest.mark.filterwarnings(words) for words in trainers.QUIET]


def test_every_architecture_is_in_the_table() -> None:
    assert list(matrix.TITLES) == list(ARCHITECTURES)


def test_the_table_is_what_is_measured() -> None:
    """A cell is the result of the checks that it stands for, run here; the reasons of a "no" are in the output."""
    written, measured = matrix.written(), matrix.measured()
    diff = difflib.unified_diff(written.splitlines(), measured.splitlines(), "README.md", "measured", lineterm="")
    assert written == measured, "\n".join(["python tests/python/support/matrix.py writes the table anew:", *diff])
