"""What must hold of every parser, whatever bytes it is given: it returns, or refuses them by a ValueError that names
the file."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
CORPUS = FOLDER / "corpus"
PARSERS = sorted(path.stem for path in (FOLDER / "parsers").glob("*.py") if path.stem != "__init__")

LARGEST = 16_384
"""Bytes of an input that fuzzing makes."""


def parser(name: str) -> Any:
    """The module of a parser.

    It has FILE, the name of the file that it reads; NAMED, what a refusal has to say, the file's name if it has none;
    HEADER, the number of bytes before its JSON, if there are any, that are the length of the JSON; and `parse`, which
    reads that file in a folder.
    """
    return importlib.import_module(f"parsers.{name}")


def inputs(name: str) -> list[Path]:
    """The committed inputs of a parser."""
    return sorted((CORPUS / name).iterdir())


def check(module: Any, data: bytes, folder: Path) -> bool:
    """Gives the input to the parser; whether it was accepted.

    Raises:
        Exception: what is written above does not hold.
    """
    (folder / module.FILE).write_bytes(data)
    named = getattr(module, "NAMED", module.FILE)
    try:
        module.parse(folder)
    except ValueError as error:
        message = str(error)
        assert named in message, f"the message does not name {named}: {message}"
        return False
    return True
