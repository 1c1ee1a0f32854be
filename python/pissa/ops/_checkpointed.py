"""The linear op as two nodes of autograd's graph: the first one saves the operands, the second one computes.

Activation checkpointing computes a block again until the last operand of it is saved, and stops there. So the last
product of a block, whose output no gradient needs, is left out: in a block of Llama's, 22 % of the forward's products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_OPS = torch.ops.pissa


def is_possible(x: Tensor, a: Tensor | None) -> bool:
    """Whether a product of `x` can be two nodes: there is a graph, and nobody traces it. On CUDA the forward also
    keeps sums of factors, which the backward would have to compute again."""
    if a is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return x.grad_fn is not None and x.device.type == "cpu"


def linear(op: str, x: Tensor, weight: Sequence[Any], factors: tuple[Any, ...]) -> Tensor:
    """`torch.ops.pissa.<op>(x, *weight, *factors)`, without what the op keeps."""
    y: Tensor = _Product.apply(_Operands.apply(x, *weight, *factors), op, len(weight), *weight, *factors)  # type: ignore[no-untyped-call, unused-ignore]
    return y


class _Operands(torch.autograd.Function):
    """x as it is. Saves it, and the tensors among the op's other arguments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Any) -> Tensor:
        ctx.numbers = [None if isinstance(value, Tensor) else value for value in others]
        ctx.save_for_backward(x, *(value if isinstance(value, Tensor) else None for value in others))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (gradients[0], *[None] * len(ctx.numbers))


class _Product(torch.autograd.Function):
    """The op, on an x that comes from `_Operands`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, op: str, slots: int, *others: Any) -> Tensor:
        ctx.op, ctx.slots, ctx.operands = op, slots, x.grad_fn
        ctx.set_materialize_grads(False)
        y: Tensor
        y, _ = getattr(_OPS, op)(x, *others)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (dy,), inputs = gradients, 3 + len(ctx.operands.numbers)
        if dy is None:
            return (None,) * inputs
        x, *saved = ctx.operands.saved_tensors
        others = [
            number if tensor is None else tensor for tensor, number in zip(saved, ctx.operands.numbers, strict=True)
        ]
        weight, (_, a, b, a0, b0, scaling, implicit) = others[: ctx.slots], others[ctx.slots :]
        kept = _kept(x, a, a0, scaling, implicit)
        backward = getattr(_OPS, f"{ctx.op}_backward")
        dx, grad_a, grad_b = backward(dy, x, *weight, a, b, a0, b0, kept, scaling, implicit, True)
        need_bias, need_a, need_b = ctx.needs_input_grad[3 + ctx.slots : 6 + ctx.slots]
        found = (
            dy.flatten(0, -2).sum(0) if need_bias else None,
            grad_a if need_a else None,
            grad_b if need_b else None,
        )
        return (dx, None, None, *[None] * ctx.slots, *found, *[None] * 4)


def _kept(x: Tensor, a: Tensor, a0: Tensor | None, scaling: float, implicit: bool) -> Tensor:
    """What the op keeps for the backward, x Aᵀ: it is that of a layer of the same a with one output."""
    b = a.new_zeros(1, len(a))
    y = x.new_empty(*x.shape[:-1], 1)
    kept: Tensor
    _, kept = _OPS.add_low_rank(y, x, a, b, a0, None if a0 is None else b, scaling, implicit)
    return kept
