"""The oldest release of everything that pyproject.toml names, as pip's requirements, a line each:
`python tests/python/support/oldest.py EXTRA NAME...` prints what pissa[EXTRA] needs. The NAMEs stay at their newest."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import tomllib

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]


def requirements(extra: str) -> Iterator[str]:
    """What pyproject.toml asks for, with the extras that `extra` names."""
    for requirement in PROJECT["optional-dependencies"][extra]:
        other = re.fullmatch(r"pissa\[(\w+)\]", requirement)
        yield from requirements(other[1]) if other else [requirement]


def oldest(extra: str, newest: list[str]) -> list[str]:
    required = [*PROJECT["dependencies"], *requirements(extra)]
    return [r if re.match(r"[\w-]+", r)[0] in newest else r.replace(">=", "==") for r in required]


if __name__ == "__main__":
    print(*oldest(sys.argv[1], sys.argv[2:]), sep="\n")
