"""Gated activations on the CPU, fused."""

from __future__ import annotations

import torch
from torch import Tensor

from pissa.ops.checks import check_choice, check_devices, check_tensor, shape_error

_OPS = torch.ops.pissa
ACTIVATIONS = "silu", "gelu_tanh"


def gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """`f(gate) · up`, as in SwiGLU and GeGLU (arXiv 2002.05202), in one pass. CPU only.

    Computed in float32 and rounded once. Differentiable in both; the backward keeps only these two tensors.

    Args:
        gate: any shape of at least one dimension, float32, bfloat16 or float16.
        up: in gate's shape and dtype.
        activation: f: "silu", or "gelu_tanh", the tanh approximation of GELU.

    Returns:
        A tensor in gate's shape and dtype.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    gate, up = check_tensor("gate", gate), check_tensor("up", up)
    if gate.dim() < 1 or up.shape != gate.shape:
        raise shape_error("up", up, f"gate's, {list(gate.shape)}, of one dimension or more")
    if up.dtype != gate.dtype:
        raise TypeError(f"up: got {up.dtype}; needed: gate's {gate.dtype}")
    check_choice("activation", activation, ACTIVATIONS)
    check_devices({"gate": gate, "up": up})
    y: Tensor = _OPS.gated(gate, up, activation)
    return y
