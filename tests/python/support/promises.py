"""What docs/compatibility.md promises, as text: the schemas of the torch ops, and the names of the API reference with
their signatures. `python tests/python/support/promises.py` writes both; rules/test_promises.py compares."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "tests/python/fixtures"

_DIRECTIVE = re.compile(r"^\.\. (?:auto|py:)(\w+):: ([\w.]+)(.*)\n((?:\n?   .*\n)*)", re.MULTILINE)
"""Kind, name, signature if it is written out, and what is indented below."""


def op_schemas() -> list[str]:
    """Of every op of the core."""
    resolve_name("pissa.ops")  # registers them
    return sorted(str(schema) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("pissa::"))


def python_api() -> list[str]:
    """Every name that docs/api/python.md describes, with its signature, and of a class the members that it shows there.
    What a class inherits from PEFT is PEFT's promise."""
    page = (ROOT / "docs/api/python.md").read_text()
    lines: set[str] = set()
    for directive in _DIRECTIVE.finditer(page):
        kind, name, written, body = directive.groups()
        named = resolve_name(name)
        if kind in ("data", "module"):
            lines.add(f"{name}: {kind}")
        elif kind == "function":
            lines.add(name + _signature(named))
        elif kind == "exception" or written == "()":  # not for users to make
            lines.add(f"{name}: class")
        else:
            lines.add(name + (written or _signature(named)))
        members = re.findall(r"automethod:: (\w+)", body)
        if found := re.search(r":members:(.*)", body):
            members += re.findall(r"\w+", found[1]) or [member for member in _own(named) if member[0] != "_"]
        lines.update(f"{name}.{member}{_described(_own(named)[member])}" for member in members)
    return sorted(lines)


def _own(named: Any) -> dict[str, Any]:
    """What a class or module defines itself: not what it inherits or imports."""
    if inspect.isclass(named):
        return dict.fromkeys(inspect.get_annotations(named)) | dict(vars(named))
    return {name: value for name, value in vars(named).items() if getattr(value, "__module__", "") == named.__name__}


def _described(member: Any) -> str:
    if isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    if inspect.isclass(member):
        return ": class"
    return _signature(member) if callable(member) else ": attribute"


def _signature(function: Callable[..., Any]) -> str:
    """With annotations as their source has them: Python's own text differs between its versions."""
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=_as_written(parameter.annotation)) for parameter in signature.parameters.values()
    ]
    returned = signature.empty if inspect.isclass(function) else _as_written(signature.return_annotation)
    return str(signature.replace(parameters=parameters, return_annotation=returned))


def _as_written(annotation: Any) -> Any:
    return annotation if annotation is inspect.Signature.empty else _Text(annotation)


class _Text:
    """An annotation that prints as it is written."""

    def __init__(self, annotation: Any) -> None:
        self.text = getattr(annotation, "__forward_arg__", annotation)

    def __repr__(self) -> str:
        return str(self.text)


KEPT: dict[str, Callable[[], list[str]]] = {"op_schemas.txt": op_schemas, "python_api.txt": python_api}


if __name__ == "__main__":
    for name, text in KEPT.items():
        (FOLDER / name).write_text("".join(f"{line}\n" for line in text()))
