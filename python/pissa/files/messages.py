"""Files that somebody else may have written: an error about one is a ValueError that names it, in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def shown(name: object) -> str:
    """A name or a value out of a file, quoted, and no longer than a line."""
    text = repr(name)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def first_line(error: Exception) -> str:
    """The first line of an error's text that is not empty, with the next one if it ends with a colon; without any, the
    error's class."""
    first, second, *_ = [*(line.strip() for line in str(error).splitlines() if line.strip()), "", ""]
    return (f"{first} {second}" if first.endswith(":") else first).strip() or type(error).__name__


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Makes a ValueError that names the file of every error in the block, which only reads it. The message ends with
    `remedy`, how to go on."""
    try:
        yield
    except Exception as error:
        reason = first_line(error)
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        elif isinstance(error, KeyError):
            reason = f"{error} is missing"
        raise ValueError(f"{path} cannot be read: {reason.rstrip('.')}. {remedy}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file of JSON. To be called in a block of `reading`."""
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError(f"the content: got {shown(found)}; needed: an object")
    return found
