"""What a check of `pissa selftest` finds: numbers, each with the largest that is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Finding(NamedTuple):
    """A number that a check has found, and the largest that is right."""

    what: str
    got: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.got <= self.allowed  # False for NaN

    def __str__(self) -> str:
        return f"{self.what}: got {self.got:.3g}, allowed {self.allowed:.3g}"


Check = Callable[[], Iterable[Finding]]
"""All that it finds is right, or the check has failed; so it has if it raises an error."""


def close(what: str, got: Tensor, exact: Tensor, bound: Tensor) -> Finding:
    """The error of the element of `got` that is farthest off for its bound, and that bound. Its rounding to got's dtype
    is allowed besides.

    Args:
        exact, bound: float64 on the CPU.
    """
    format = torch.finfo(got.dtype)
    # An element among the subnormal numbers is rounded to the nearest of them.
    limit = bound + format.eps / 2 * exact.abs() + format.smallest_normal * format.eps
    error = (got.detach().cpu().double() - exact).abs()
    worst = (error / limit).argmax()  # NaN counts as the largest
    return Finding(f"error of {what}", error.flatten()[worst].item(), limit.flatten()[worst].item())


def same(what: str, got: Tensor, expected: Tensor) -> Finding:
    """How many elements are not the same number."""
    return Finding(f"elements that differ in {what}", float((got != expected).sum().item()), 0.0)
