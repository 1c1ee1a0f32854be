"""Packages that may not be here: their versions, and whether they import."""

from __future__ import annotations

import importlib
import importlib.metadata
from functools import cache


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def missing(*packages: str) -> str | None:
    """Why not all of these packages can be used: the first that does not import, whatever it raises. None: they can."""
    for package in packages:
        try:
            importlib.import_module(package)
        except Exception as error:
            return f"{package} does not import ({type(error).__name__}: {error})"
    return None
