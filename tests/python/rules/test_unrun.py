"""The table of the tests that the stand-in for a GPU does not run names tests that there are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import unrun

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("name", [*unrun.FAILS, *unrun.ABORTS])
def test_it_is_there(name: str) -> None:
    file, function = name.split("::")
    tree = ast.parse((TESTS / file).read_text())
    assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
