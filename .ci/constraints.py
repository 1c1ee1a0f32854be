"""The releases that the environment of this Python has, as pip's constraints for every Python that pissa is for:
`build/python3.X/venv-test/bin/python .ci/constraints.py >.ci/constraints.txt` renews those of CI."""

from __future__ import annotations

import re
from importlib import metadata

from packaging.specifiers import SpecifierSet

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# torch, and what its builds for CUDA bring: each Python gets the newest that pip has for it, since the wheel promises
# to go on working beside later ones.
LEFT_OUT = re.compile(r"pip|pissa|setuptools|wheel|torch|triton|(cuda|nvidia)-.*")


def constraint(package: metadata.Distribution) -> str:
    """A version without the build that it may name after a "+", from the first Python on that the release takes."""
    pinned = f"{package.name}=={package.version.split('+')[0]}"
    required = SpecifierSet(package.metadata.get("Requires-Python") or "")
    first = next(python for python in PYTHONS if f"{python}.99" in required)
    return pinned if first == PYTHONS[0] else f'{pinned} ; python_version >= "{first}"'


if __name__ == "__main__":
    print("# What CI installs, by .ci/constraints.py; docs/releases.md says how it is renewed.")
    packages = {package.name.lower(): package for package in metadata.distributions()}
    print(*(constraint(packages[name]) for name in sorted(packages) if not LEFT_OUT.fullmatch(name)), sep="\n")
