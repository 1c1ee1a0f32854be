"""A function that the user interrupts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Interrupted:
    """Calls `real`, but for one call, which is interrupted. `calls` counts them."""

    def __init__(self, real: Callable[..., Any], at: int) -> None:
        self.real, self.at, self.calls = real, at, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.real(*args)
