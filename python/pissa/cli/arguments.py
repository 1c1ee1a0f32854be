"""Types of arguments that are numbers, with their limits."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def number(convert: Callable[[str], Any], allowed: str, valid: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A `type` for argparse: `convert` reads the text, `valid` checks the value, `allowed` completes the error."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not valid(value):
            raise argparse.ArgumentTypeError(f"got {text!r}; allowed: {allowed}")
        return value

    return parse


positive_int = number(int, "a whole number above 0", lambda value: value > 0)
passes = number(
    lambda text: text if text == "auto" else int(text),
    "auto, or an even number of at least 2",
    lambda value: value == "auto" or (value >= 2 and value % 2 == 0),
)
