"""The book's table of architectures is what is tested."""

from __future__ import annotations

import pytest

import matrix


@pytest.mark.nightly  # which collects every architecture
def test_the_table_is_of_the_tests_that_run() -> None:
    assert matrix.written() == matrix.table(), "python tests/python/support/matrix.py writes it anew"
