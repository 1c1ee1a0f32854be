"""Reading JSON that somebody else may have written: of bounded size, every name once, nothing but JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn


def read_json(path: Path, limit: int) -> Any:
    """What the file holds.

    Args:
        limit: bytes that it may have.

    Raises:
        OSError, ValueError, RecursionError: it cannot be read; the file is not named.
    """
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it is larger than {limit} bytes")
    return parse_json(content)


def parse_json(content: bytes) -> Any:
    """What the bytes of a JSON text mean; a name that is there twice and NaN or Infinity are errors.

    Raises:
        ValueError, RecursionError: it is not JSON.
    """
    return json.loads(content.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)


def shown(name: object) -> str:
    """A name out of a file, for a message: on one line, and no longer than a line."""
    text = repr(name)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def first_line(error: Exception) -> str:
    """The first line of another library's error, for a message on one line; the error's class if it has no text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object that json has read, in which no name may come twice: for the last to win would be a guess."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(name for name in names if names.count(name) > 1))} is there twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is not JSON")
