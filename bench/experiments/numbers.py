"""Numbers as results hold them."""

from __future__ import annotations

import math


def rounded(value: float) -> float | None:
    """Six digits; None if it is not finite, which JSON cannot say."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
