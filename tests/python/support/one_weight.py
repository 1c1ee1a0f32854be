"""One weight, given to functions that take many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pissa import ops


def split(
    weight: Tensor, r: int, *, scaling: float = 1.0, second_moment: Tensor | None = None, **options: Any
) -> ops.Split:
    """What `ops.split_many` makes of a weight, whose name in errors is "weight"."""
    moments = None if second_moment is None else [second_moment]
    return ops.split_many([weight], [r], [scaling], names=["weight"], second_moments=moments, **options)[0]


def quantize_with_feedback(weight: Tensor, second_moment: Tensor, format: str = "nf4", **options: Any) -> Any:
    """The codes of a whole weight by error feedback: a residual that lacks nothing, of `ops.residual_many`."""
    rows, columns = weight.shape
    on = {"dtype": torch.float32, "device": weight.device}
    nothing = [torch.zeros(0, columns, **on)], [torch.zeros(rows, 0, **on)], [1.0]
    names, moments = ["weight"], [second_moment]
    return ops.residual_many([weight], *nothing, form=format, names=names, second_moments=moments, **options)[0]
