"""Numbers in the form in which results store them."""

from __future__ import annotations

import math
from typing import Any


def rounded(value: float) -> float | None:
    """Six digits. None if the number is not finite, because JSON cannot represent that."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def log_of(trainer: Any) -> dict[str, Any]:
    """What transformers' trainer has logged for each step, before gradient clipping, and how much it trains."""
    steps = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "losses": [rounded(row["loss"]) for row in steps],
        "gradient_norms": [rounded(row["grad_norm"]) for row in steps],
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }
