"""Private names of PEFT, and of transformers' integration with it, are in `peft_private` only, each with its reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from torch import nn

PACKAGE = Path(__file__).parents[3] / "python" / "pissa"
HOME = PACKAGE / "peft_private.py"
INTEGRATION = "transformers.integrations.peft"
TUNERS = ("lora", "trainable_tokens")  # whose classes ours derive from


def peft_sources() -> list[Path]:
    """The files of PEFT that concern us, and transformers' integration."""
    peft, integration = find_spec("peft"), find_spec(INTEGRATION)
    assert peft is not None
    assert peft.origin is not None
    assert integration is not None
    assert integration.origin is not None
    root = Path(peft.origin).parent
    others = {path for path in (root / "tuners").iterdir() if path.is_dir() and path.name not in TUNERS}
    files = [path for path in sorted(root.rglob("*.py")) if not others & set(path.parents)]
    return [*files, Path(integration.origin)]


def defined(tree: ast.Module) -> Iterator[str]:
    """The functions, methods and classes of a module, what it and its classes assign, and attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        if isinstance(node, ast.Module | ast.ClassDef):
            for statement in node.body:
                for child in ast.walk(statement) if isinstance(statement, ast.Assign | ast.AnnAssign) else ():
                    if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                        yield child.id


@cache
def private_names() -> frozenset[str]:
    names = {name for path in peft_sources() for name in defined(ast.parse(path.read_text()))}
    torchs = {name for kind in vars(nn).values() if isinstance(kind, type) for name in dir(kind)} | vars(
        nn.Module()
    ).keys()
    return frozenset(name for name in names - torchs if name.startswith("_") and not name.startswith("__"))


def used(source: str) -> Iterator[tuple[int, str]]:
    """Lines and private names of PEFT in a source: attributes, imports, definitions, and strings, as getattr takes."""
    for node in ast.walk(ast.parse(source)):
        name: object = None
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.FunctionDef | ast.alias):
            name = node.name
        elif isinstance(node, ast.Constant):
            name = node.value
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        if isinstance(name, str) and name in private_names():
            yield node.lineno, name


def test_private_names_of_peft_are_in_one_file() -> None:
    found = [
        f"python/pissa/{path.relative_to(PACKAGE).as_posix()}:{line}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != HOME
        for line, name in used(path.read_text())
    ]
    assert not found, f"private names of PEFT outside {HOME.name}: {', '.join(found)}"
