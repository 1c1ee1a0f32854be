"""Outside `base` nobody asks which kind of base a module is: what a base is asked is in `base.protocol`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[3] / "python" / "pissa"
BASE = PACKAGE / "base"

# Modules that can be a base.
KINDS = {"Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d", "Linear4bit", "Linear8bitLt"}
OURS = {
    node.name
    for path in BASE.glob("*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.ClassDef)
}


def names(node: ast.AST) -> set[str]:
    """The last parts of all names below a node."""
    found = {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
    return found | {child.attr for child in ast.walk(node) if isinstance(child, ast.Attribute)}


def asked(source: str) -> Iterator[tuple[int, str]]:
    """Lines of a source that ask for the kind of a base, and what they ask for."""
    for node in ast.walk(ast.parse(source)):
        found: set[str] = set()
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        ):
            found = names(node.args[1])
        elif isinstance(node, ast.Compare) and any(
            isinstance(part, ast.Call) and names(part.func) == {"type"} for part in (node.left, *node.comparators)
        ):
            found = names(node)
        elif isinstance(node, ast.MatchClass):
            found = names(node.cls)
        elif isinstance(node, ast.Name | ast.alias):
            found = {getattr(node, "id", getattr(node, "name", ""))} & {"is_bitsandbytes"}
        for name in sorted(found & (KINDS | OURS | {"is_bitsandbytes"})):
            yield node.lineno, name


def test_only_base_knows_the_kinds_of_bases() -> None:
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if BASE not in path.parents]
    found = [f"{path.relative_to(PACKAGE)}:{line}: {name}" for path in paths for line, name in asked(path.read_text())]
    assert not found, f"ask base.classes.base_of(module), a pissa.base.protocol.Base, instead of: {found}"
