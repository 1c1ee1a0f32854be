"""Files that somebody else may have written: an error about one is a ValueError that names it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pissa.files.messages import first_line, shown


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Names the file in whatever goes wrong in the block, which only reads it.

    Args:
        remedy: what the message says of how to go on.

    Raises:
        ValueError: for every error in the block.
    """
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
    """The object in a file of JSON. To be called in a block of `reading`.

    Raises:
        OSError, ValueError: it cannot be read, or holds something else; the message does not name the file.
    """
    found: dict[str, Any] = typed(json.loads(path.read_bytes()), dict[str, Any], "the content")
    return found


def typed(value: Any, kind: Any, where: str) -> Any:
    """Checks a parsed value, and returns it.

    Args:
        kind: a type of JSON's, or a union, list or dict of such.
        where: what the message calls the value.

    Raises:
        ValueError: the value is of another type.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None:
            return None
        kind = next(arg for arg in args if arg is not type(None))
        return typed(value, kind, where)
    if origin is list:
        if isinstance(value, list):
            return [typed(item, args[0], f"{where}[{index}]") for index, item in enumerate(value)]
    elif origin is dict:
        if isinstance(value, dict):
            return {key: typed(item, args[1], f"{where}[{shown(key)}]") for key, item in value.items()}
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            return value
    elif kind is Any or (isinstance(value, kind) and isinstance(value, bool) == (kind is bool)):
        return value
    wanted = kind.__name__ if isinstance(kind, type) and not args else kind
    raise ValueError(f"{where}: got {shown(value)}; needed: {wanted}")
