"""JSON that somebody else may have written: of bounded size, every name once, of the expected types."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from pissa.files.messages import printable, shown

SIZE_LIMIT = 100_000_000
"""Bytes that a JSON file may have, as many as a header of safetensors. Parsed they take up to 33 times as many."""


def read_json(path: Path, limit: int = SIZE_LIMIT) -> Any:
    """Reads the file, which may have at most `limit` bytes.

    Raises:
        OSError, ValueError: it cannot be read; the message does not name the file.
    """
    with open(path, "rb") as file:
        content = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)  # read takes as much memory as it is told
    if len(content) > limit:
        raise ValueError(f"it is larger than {limit} bytes")
    return parse_json(content)


def parse_json(content: bytes) -> Any:
    """Parses the bytes of a JSON text.

    Raises:
        ValueError: it is not JSON, holds NaN or Infinity, has one name twice in an object, or is nested too deeply.
    """
    try:
        return json.loads(content.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("its lists or objects are nested too deeply") from None


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Reads a file that holds one object.

    Args:
        remedy: what the message says of how to go on.

    Raises:
        ValueError: naming the file, and what is wrong with it.
    """
    try:
        content = read_json(path)
        if not isinstance(content, dict):
            raise ValueError(f"it holds {shown(content)}; needed: an object")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"{path} cannot be read: {reason}. {remedy}") from error
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. A name may not come twice: to let the last one win would be a guess."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"{shown(Counter(name for name, _ in pairs).most_common(1)[0][0])} is there twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is not JSON")


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Names the file, one of ours, in errors about its content.

    Raises:
        ValueError: for every error in the block.
    """
    try:
        yield
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read: {printable(error)}. It is not as save_pretrained wrote it: save the adapter "
            "again, or take the file from a copy"
        ) from error


def typed(value: Any, kind: Any, where: str) -> Any:
    """Checks a parsed value, and makes the records in it.

    Args:
        kind: a type of JSON's, a Union, Literal, list or dict of such, or a record (dataclass or NamedTuple). A record
            is made from an object that has all of its fields and no others.
        where: what the message calls the value.

    Raises:
        ValueError: the value is of another type.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and type(None) in args:
            return None
        alternatives = [alternative for alternative in args if alternative is not type(None)]
        if len(alternatives) == 1:
            return typed(value, alternatives[0], where)
        for alternative in alternatives:
            try:
                return typed(value, alternative, where)
            except ValueError:
                continue
    elif origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
    elif origin is list:
        if isinstance(value, list):
            return [typed(item, args[0], f"{where}[{index}]") for index, item in enumerate(value)]
    elif origin is dict:
        if isinstance(value, dict):
            return {key: typed(item, args[1], f"{where}[{shown(key)}]") for key, item in value.items()}
    elif hasattr(kind, "_fields") or dataclasses.is_dataclass(kind):
        return kind(**typed_fields(value, get_type_hints(kind), where))
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            return value
    elif kind is Any or (isinstance(value, kind) and isinstance(value, bool) == (kind is bool)):
        return value
    wanted = kind.__name__ if isinstance(kind, type) and not args else kind
    raise ValueError(f"{where}: got {shown(value)}; needed: {wanted}")


def typed_fields(value: Any, hints: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checks a parsed object, which must have just the fields of `hints`; as `typed`."""
    typed(value, dict[str, Any], where)
    for name in [*value, *hints]:
        if name not in hints:
            raise ValueError(f"{where} has an unknown field {shown(name)}; known: {', '.join(hints)}")
        if name not in value:
            raise ValueError(f"{where} has no field {name!r}")
    return {name: typed(value[name], hint, name) for name, hint in hints.items()}
