"""Second moments R = E[xᵀx] of a layer's inputs x, and error feedback, which chooses the layer's codes by them.

Codes by error feedback (GPTQ, arXiv 2210.17323) lose less of the outputs than the codes nearest to the weight, in the
same number of bytes: each column compensates for the errors of the columns that were rounded before it. The algorithm
is in cpp/pissa/core/error_feedback.h.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pissa.ops import _autograd  # noqa: F401  registers fakes
from pissa.ops.checks import FLOATS, check_devices, check_tensor, check_weights

_OPS = torch.ops.pissa

DAMPING = 0.3
"""For error feedback: the share of R's mean diagonal that is added to its diagonal. GPTQ uses 0.01, with 260,000
tokens. With a few thousand, R is noise in most directions, and small damping fits the codes to it (bench/NOTES.md)."""


def add_second_moment(total: Tensor, x: Tensor) -> None:
    """Adds xᵀx to the lower triangle of a sum, in place. The bits do not depend on the number of threads.

    Args:
        total: float32 [in, in], contiguous. Its elements above the diagonal are undefined afterwards.
        x: [..., in], float32, bfloat16 or float16, on the sum's device.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    check_tensor("x", x, FLOATS)
    check_tensor("total", total, (torch.float32,))
    side = x.shape[-1]
    if total.shape != (side, side) or not total.is_contiguous():
        raise ValueError(f"total: got {list(total.shape)}; needed: [in, in] = [{side}, {side}], contiguous")
    check_devices({"total": total, "x": x})
    _OPS.add_second_moment(total, x.detach().reshape(-1, side))


def check_moments(moments: Sequence[object], weights: Sequence[Tensor], weight_names: Sequence[str]) -> list[Tensor]:
    """Checks the second moments of the named weights' inputs and returns them, one for each weight, finite and in
    float32."""
    names = [f"second_moment of {name}" for name in weight_names]
    for moment, weight, name, weight_name in zip(moments, weights, names, weight_names, strict=True):
        side = weight.shape[1]
        if not isinstance(moment, Tensor) or moment.shape != (side, side) or moment.dtype != torch.float32:
            got = f"{list(moment.shape)} in {moment.dtype}" if isinstance(moment, Tensor) else type(moment).__name__
            raise ValueError(f"{name}: got {got}; needed: [in, in] = [{side}, {side}] in torch.float32")
        check_devices({weight_name: weight, name: moment})
    return check_weights(moments, names)[0]


def feedback_factors(moments: Sequence[Tensor]) -> list[Tensor]:
    """The lower Cholesky factors of damped second moments, float32 [in, in]. torch computes them in float64 with LAPACK
    or cuSOLVER, once for weights that share a moment."""
    factors: dict[int, Tensor] = {}  # by address
    for moment in moments:
        if moment.data_ptr() not in factors:
            damped = moment.double()
            damping = DAMPING * damped.diagonal().mean()
            damped.diagonal().add_(damping.where(damping > 0, 1))  # no inputs at all: codes as without
            # In place, in LAPACK's column-major order: for 11,008 inputs each copy is 1 GB.
            place, info = damped.mT, torch.empty((), dtype=torch.int32, device=damped.device)
            torch.linalg.cholesky_ex(place, check_errors=True, out=(place, info))
            factors[moment.data_ptr()] = place.float()
    return [factors[moment.data_ptr()] for moment in moments]
