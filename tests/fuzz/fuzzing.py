"""What must hold of every parser, whatever bytes it is given: it returns, or refuses them by a ValueError that names
the file; it takes at most a second, and memory of at most twice the input and 1 MB."""

from __future__ import annotations

import importlib
import time
import tracemalloc
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
CORPUS = FOLDER / "corpus"
PARSERS = sorted(path.stem for path in (FOLDER / "parsers").glob("*.py") if path.stem != "__init__")

SECONDS = 1.0
"""Of the processor."""

SPARE = 1_000_000
"""Bytes of memory beside twice the input."""

LARGEST = 16_384
"""Bytes of an input. Objects of Python are up to 33 times as large as their JSON: beyond this the bound holds only of
files that are mostly values of tensors."""


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


def check(module: Any, data: bytes, folder: Path) -> tuple[bool, int]:
    """Gives the input to the parser.

    Returns:
        whether it was accepted, and the peak of memory.

    Raises:
        Exception: what is written above does not hold.
    """
    (folder / module.FILE).write_bytes(data)
    limit = 2 * len(data) + SPARE
    accepted, taken, peak = _run(module, folder)
    if taken > SECONDS or peak > limit:  # the first run may have imported something
        accepted, taken, peak = _run(module, folder)
    assert peak <= limit, f"{peak} bytes of memory for an input of {len(data)}"
    assert taken <= SECONDS, f"{taken:.1f} s"
    return accepted, peak


def _run(module: Any, folder: Path) -> tuple[bool, float, int]:
    """Whether the input was accepted, the seconds, and the peak of memory."""
    named = getattr(module, "NAMED", module.FILE)
    accepted, began = True, time.process_time()
    tracemalloc.start()
    try:
        module.parse(folder)
    except ValueError as error:
        accepted, message = False, str(error)
        assert named in message, f"the message does not name {named}: {message}"
        message.encode()  # it can be printed
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return accepted, time.process_time() - began, peak
