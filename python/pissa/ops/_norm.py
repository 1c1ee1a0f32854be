"""RMSNorm on the CPU, fused."""

from __future__ import annotations

import torch
from torch import Tensor

from pissa.ops.checks import check_devices, check_frozen, check_number, check_tensor, shape_error

_OPS = torch.ops.pissa


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0) -> Tensor:
    """`x / sqrt(mean(x²) + eps) · (offset + weight)` over the last dimension, in one pass. CPU only.

    Computed in float32 and rounded once. Differentiable in x; the backward keeps x and one number for each row.

    Args:
        x: [..., n], float32, bfloat16 or float16.
        weight: [n] in any of these dtypes, frozen.
        eps: at least 0.
        offset: 1 for Gemma's norms, where the weight is added to 1.

    Returns:
        [..., n] in x's dtype.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    x, weight = check_tensor("x", x), check_tensor("weight", weight)
    if weight.dim() != 1 or x.dim() < 1 or x.shape[-1] != len(weight) or not len(weight):
        raise shape_error("weight", weight, f"[n] for an x of [..., n], {list(x.shape)}")
    check_frozen(weight=weight)
    check_number("eps", eps, "a finite number, at least 0", least=0)
    check_number("offset", offset)
    check_devices({"x": x, "weight": weight})
    y: Tensor
    y, _ = _OPS.rms_norm(x, weight, float(offset), float(eps))
    return y
