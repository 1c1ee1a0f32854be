"""The book's table of architectures is what their tests hold."""

from __future__ import annotations

import matrix


def test_the_table_is_what_the_tests_hold() -> None:
    assert matrix.written() == matrix.table(), "python tests/python/support/matrix.py writes it anew"
