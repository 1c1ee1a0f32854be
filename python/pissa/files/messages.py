"""Foreign text in messages of ours: on one line, and no longer than a line."""

from __future__ import annotations


def shown(name: object) -> str:
    """A name out of a file, quoted."""
    try:
        text = repr(name)
    except RecursionError:  # nested nearly as deep as Python goes
        text = f"{type(name).__name__} of many levels"
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def printable(text: object) -> str:
    """A text that may quote halves of surrogate pairs, which JSON can spell and no stream takes."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def first_line(error: Exception) -> str:
    """The first line of an error's text that is not empty, with the next one if it ends with a colon; without any, the
    error's class."""
    first, second, *_ = [*(line.strip() for line in printable(error).splitlines() if line.strip()), "", ""]
    return (f"{first} {second}" if first.endswith(":") else first).strip() or type(error).__name__
