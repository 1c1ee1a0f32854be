"""Fakes (shapes and dtypes for torch.compile) and gradients of torch.ops.pissa.*, whose kernels are compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from pissa.ops._load import _C  # noqa: F401  loading it defines the ops

# ---- Fakes -----------------------------------------------------------------------------------------------------------


def _bytes(like: Tensor, count: int) -> Tensor:
    return like.new_empty(count, dtype=torch.uint8)


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _quantized(like: Tensor, count: int, blocksize: int) -> tuple[Tensor, Tensor]:
    return _bytes(like, (count + 1) // 2), _floats(like, (count + blocksize - 1) // blocksize)


@register_fake("pissa::svd_lowrank")
def _(weight: Tensor, r: int, svd: str, passes: int | None, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return _floats(weight, r, weight.shape[0]), _floats(weight, r), _floats(weight, r, weight.shape[1])


@register_fake("pissa::split")
def _(weight: Tensor, r: int, scaling: float, svd: str, passes: int | None, seed: int) -> tuple[Tensor, Tensor]:
    return _floats(weight, r, weight.shape[1]), _floats(weight, weight.shape[0], r)


@register_fake("pissa::split_many")
def _(
    weights: list[Tensor], ranks: list[int], scalings: list[float], svd: str, passes: int | None, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    pairs = list(zip(weights, ranks, strict=True))
    return [_floats(w, r, w.shape[1]) for w, r in pairs], [_floats(w, w.shape[0], r) for w, r in pairs]


@register_fake("pissa::split_nf4")
def _(
    weight: Tensor, r: int, scaling: float, svd: str, passes: int | None, seed: int, quant_iters: int, blocksize: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    factors = _floats(weight, r, weight.shape[1]), _floats(weight, weight.shape[0], r)
    return (*factors, *_quantized(weight, weight.numel(), blocksize))


@register_fake("pissa::residual")
def _(weight: Tensor, a0: Tensor, b0: Tensor, scaling: float) -> Tensor:
    return weight.new_empty(weight.shape)


@register_fake("pissa::residual_nf4")
def _(weight: Tensor, a0: Tensor, b0: Tensor, scaling: float, blocksize: int) -> tuple[Tensor, Tensor]:
    return _quantized(weight, weight.numel(), blocksize)


@register_fake("pissa::nf4_quantize")
def _(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return _quantized(weight, weight.numel(), blocksize)


@register_fake("pissa::quantize_absmax")
def _(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    return _bytes(absmax, absmax.numel()), _floats(absmax, (absmax.numel() + 255) // 256)


@register_fake("pissa::nf4_dequantize")
def _(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    rows: int,
    cols: int,
    blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((rows, cols), dtype=dtype)


def _fake_linear(x: Tensor, out_features: int, delta_a: Tensor | None) -> tuple[Tensor, Tensor]:
    tokens, r = (x.numel() // x.shape[-1], delta_a.shape[0]) if delta_a is not None else (0, 0)
    return x.new_empty((*x.shape[:-1], out_features)), _floats(x, tokens, r)


def _fake_linear_backward(
    x: Tensor, out_features: int, delta_a: Tensor | None, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    r, rows, cols = (delta_a.shape[0], out_features, x.shape[-1]) if delta_a is not None else (0, 0, 0)
    return x.new_empty(x.shape if need_dx else (0,)), _floats(x, r, cols), _floats(x, rows, r)


@register_fake("pissa::linear")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta_a: Tensor | None,
    delta_b: Tensor | None,
    a0: Tensor | None,
    b0: Tensor | None,
    scaling: float,
    implicit: bool,
) -> tuple[Tensor, Tensor]:
    return _fake_linear(x, weight.shape[0], delta_a)


@register_fake("pissa::nf4_linear")
def _(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    blocksize: int,
    bias: Tensor | None,
    delta_a: Tensor | None,
    delta_b: Tensor | None,
    a0: Tensor | None,
    b0: Tensor | None,
    scaling: float,
    implicit: bool,
) -> tuple[Tensor, Tensor]:
    return _fake_linear(x, out_features, delta_a)


@register_fake("pissa::linear_backward")
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    delta_a: Tensor | None,
    delta_b: Tensor | None,
    a0: Tensor | None,
    b0: Tensor | None,
    xa: Tensor,
    scaling: float,
    implicit: bool,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_linear_backward(x, weight.shape[0], delta_a, need_dx)


@register_fake("pissa::nf4_linear_backward")
def _(
    dy: Tensor,
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    blocksize: int,
    delta_a: Tensor | None,
    delta_b: Tensor | None,
    a0: Tensor | None,
    b0: Tensor | None,
    xa: Tensor,
    scaling: float,
    implicit: bool,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_linear_backward(x, out_features, delta_a, need_dx)


@register_fake("pissa::add_low_rank")
def _(
    base: Tensor,
    x: Tensor,
    delta_a: Tensor,
    delta_b: Tensor,
    a0: Tensor | None,
    b0: Tensor | None,
    scaling: float,
    implicit: bool,
) -> tuple[Tensor, Tensor]:
    return base.new_empty(base.shape), _floats(x, x.numel() // x.shape[-1], delta_a.shape[0])


@register_fake("pissa::add_low_rank_backward")
def _(
    dy: Tensor,
    x: Tensor,
    delta_a: Tensor,
    delta_b: Tensor,
    a0: Tensor | None,
    b0: Tensor | None,
    xa: Tensor,
    scaling: float,
    implicit: bool,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_linear_backward(x, dy.shape[-1], delta_a, need_dx)


# ---- Gradients -------------------------------------------------------------------------------------------------------
# Both linears have the same tail of arguments (bias, delta_a, delta_b, a0, b0, scaling, implicit) after x and what
# holds the weight: one tensor, or NF4's four tensors and two numbers. Saved for the backward: x and x Aᵀ.

_TAIL = 7


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *weight = inputs[:-_TAIL]
    _, *factors, scaling, implicit = inputs[-_TAIL:]
    _, xa = output
    ctx.mark_non_differentiable(xa)
    ctx.set_materialize_grads(False)
    ctx.weight_tensors = sum(value is None or isinstance(value, Tensor) for value in weight)
    ctx.save_for_backward(x, xa, *weight[: ctx.weight_tensors], *factors)
    ctx.weight_numbers = weight[ctx.weight_tensors :]
    ctx.scaling, ctx.implicit = scaling, implicit
    ctx.has_adapter = factors[0] is not None


def _backward(op: Any, ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    weight_slots = [None] * (ctx.weight_tensors + len(ctx.weight_numbers))
    if dy is None:
        return (None, *weight_slots, *[None] * _TAIL)
    x, xa, *saved = ctx.saved_tensors
    weight, factors = saved[: ctx.weight_tensors], saved[ctx.weight_tensors :]
    need_dx = ctx.needs_input_grad[0]
    need_bias, need_a, need_b = ctx.needs_input_grad[-_TAIL : -_TAIL + 3]
    bias_grad = dy.flatten(0, -2).sum(0) if need_bias else None
    dx, grad_a, grad_b = op(dy, x, *weight, *ctx.weight_numbers, *factors, xa, ctx.scaling, ctx.implicit, need_dx)
    return (
        dx if need_dx else None,
        *weight_slots,
        bias_grad,
        grad_a if need_a else None,
        grad_b if need_b else None,
        *[None] * (_TAIL - 3),
    )


def _linear_backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return _backward(torch.ops.pissa.linear_backward, ctx, dy)


def _nf4_linear_backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return _backward(torch.ops.pissa.nf4_linear_backward, ctx, dy)


def _low_rank_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, x, *factors, scaling, implicit = inputs
    _, xa = output
    ctx.mark_non_differentiable(xa)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, xa, *factors)
    ctx.scaling, ctx.implicit = scaling, implicit


def _low_rank_backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    x, xa, *factors = ctx.saved_tensors
    need_base, need_dx, need_a, need_b = ctx.needs_input_grad[:4]
    dx, grad_a, grad_b = torch.ops.pissa.add_low_rank_backward(dy, x, *factors, xa, ctx.scaling, ctx.implicit, need_dx)
    return (
        dy if need_base else None,
        dx if need_dx else None,
        grad_a if need_a else None,
        grad_b if need_b else None,
        *(None,) * 4,
    )


register_autograd("pissa::linear", _linear_backward, setup_context=_setup_context)
register_autograd("pissa::nf4_linear", _nf4_linear_backward, setup_context=_setup_context)
register_autograd("pissa::add_low_rank", _low_rank_backward, setup_context=_low_rank_setup_context)
