"""Files that others may have written: an error about one is a ValueError that names it, in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def quote(name: object) -> str:
    """A name or value from a file, quoted, and at most one line long."""
    text = repr(name)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def first_line(error: Exception) -> str:
    """The first non-empty line of an error's text, together with the next one if it ends with a colon. Without text,
    the error's class."""
    first, second, *_ = [*(line.strip() for line in str(error).splitlines() if line.strip()), "", ""]
    return (f"{first} {second}" if first.endswith(":") else first).strip() or type(error).__name__


def is_short_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory, for which torch has no class of its own on the CPU."""
    words = ("DefaultCPUAllocator", "not enough memory", "bad_alloc", "annot allocate memory", "out of memory")
    is_torchs = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return isinstance(error, MemoryError) or is_torchs


class CodeError(ValueError):
    """A model or its tokenizer is code that comes with it, which is not run."""

    def __init__(self, name: object, file: str, names: object) -> None:
        super().__init__(
            f"{name} needs code that comes with it ({quote(names)} in {file}), which is not run; read it first: "
            "`pissa finetune`, `dpo` and `chat` run it with --trust-remote-code, and in Python, transformers loads the "
            "model with trust_remote_code=True, for pissa.wrap [P126]"
        )


_CODE = re.compile(r"\[P\d{3}\]$")
_LASTING = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


@contextmanager
def file_errors(path: Path, remedy: str) -> Iterator[None]:
    """Turns every error in the block, which only reads the file, into a ValueError that names the file. The message
    ends with `remedy`, how to continue, unless the error ends with a code and so says that itself. An OSError that may
    be gone the next time, such as that of a server, stays an OSError, and a lack of memory stays what it is."""
    try:
        yield
    except OSError as error:
        if not isinstance(error, _LASTING) and error.errno is not None:
            text = f"{error.strerror}; nothing is wrong with the file as far as is known: try again [P075]"
            raise OSError(error.errno, text, str(path)) from error
        raise ValueError(f"{path} cannot be read: {error.strerror or first_line(error)}. {remedy}") from error
    except Exception as error:
        if is_short_of_memory(error):
            raise
        reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        advice = "" if _CODE.search(reason) else f". {remedy}"
        raise ValueError(f"{path} cannot be read: {reason.rstrip('.')}{advice}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file. To be called in a block of `file_errors`."""
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(f"the content: got {quote(content)}; needed: an object")
    return content
