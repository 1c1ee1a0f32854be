"""What of a parametrised test runs on every change."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def each(cases: Iterable[Any], daily: Container[Any]) -> list[Any]:
    """Parameters of pytest: those that are in `daily`, or begin with what is, and the others marked nightly."""
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*row, marks=() if row[0] in daily or row in daily else pytest.mark.nightly) for row in rows]
