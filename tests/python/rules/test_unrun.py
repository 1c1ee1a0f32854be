"""The tables of the tests that a stand-in for a GPU or for Windows does not run name tests that there are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import unrun

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("name", [*unrun.FAILS, *unrun.ABORTS, *unrun.ABORTS_UNDER_WINE])
def test_it_is_there(name: str) -> None:
    file, function = name.split("::")
    tree = ast.parse((TESTS / file).read_text())
    assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
