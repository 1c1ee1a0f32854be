"""Foreign text in messages of ours: on one line, and no longer than a line."""

from __future__ import annotations


def shown(name: object) -> str:
    """A name out of a file, quoted."""
    text = repr(name)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def first_line(error: Exception) -> str:
    """The first line of an error's text that is not empty, with the next one if it ends with a colon; without any, the
    error's class."""
    first, second, *_ = [*(line.strip() for line in str(error).splitlines() if line.strip()), "", ""]
    return (f"{first} {second}" if first.endswith(":") else first).strip() or type(error).__name__
