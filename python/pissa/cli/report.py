"""The lines that a command prints on stdout; progress bars and errors go to stderr."""

from __future__ import annotations


def say(label: str, text: str) -> None:
    """One line: what it is about, and what there is to say."""
    print(f"{label:<9} {text}", flush=True)
