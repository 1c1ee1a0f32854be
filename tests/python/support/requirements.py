"""What pyproject.toml asks for, as pip's requirements, a line each: `python tests/python/support/requirements.py EXTRA`
prints what pissa[EXTRA] needs; with --oldest the oldest release of each, but for the names after --but. In the place of
an extra, the name of one of the dependency groups gives what the group has."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10; pip is in every environment that this file is run in
    from pip._vendor import tomli as tomllib

PYPROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
PROJECT, GROUPS = PYPROJECT["project"], PYPROJECT["dependency-groups"]


def of_extra(extra: str) -> Iterator[str]:
    """What pyproject.toml asks for, with the extras that `extra` names."""
    for requirement in PROJECT["optional-dependencies"][extra]:
        other = re.fullmatch(r"pissa\[(\w+)\]", requirement)
        yield from of_extra(other[1]) if other else [requirement]


def newest(name: str) -> list[str]:
    return GROUPS[name] if name in GROUPS else [*PROJECT["dependencies"], *of_extra(name)]


def oldest(extra: str, but: list[str]) -> list[str]:
    return [r if re.match(r"[\w-]+", r)[0] in but else r.replace(">=", "==") for r in newest(extra)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("extra")
    parser.add_argument("--oldest", action="store_true")
    parser.add_argument("--but", nargs="*", default=[])
    arguments = parser.parse_args()
    print(*oldest(arguments.extra, arguments.but) if arguments.oldest else newest(arguments.extra), sep="\n")
