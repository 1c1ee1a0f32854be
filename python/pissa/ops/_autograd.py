"""Fakes (shapes and dtypes for torch.compile) and gradients of torch.ops.pissa.*, whose kernels are compiled."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from pissa.ops._load import _C  # loading it defines the ops
from pissa.ops.formats import FORMATS, NESTED_BLOCKSIZE

_FEW_TOKENS: int = _C.limits()["few_tokens"]

# ---- Fakes -----------------------------------------------------------------------------------------------------------


def _bytes(like: Tensor, count: int) -> Tensor:
    return like.new_empty(count, dtype=torch.uint8)


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _factors(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    return _floats(weight, r, weight.shape[1]), _floats(weight, weight.shape[0], r)


def _quantized(weight: Tensor, format: str, blocksize: int) -> tuple[Tensor, Tensor]:
    parts = FORMATS[format].tensors((weight.shape[0], weight.shape[1]), blocksize, double_quant=False)
    codes, absmax = (weight.new_empty(shape, dtype=dtype) for shape, dtype in parts.values())
    return codes, absmax


@register_fake("pissa::max_abs")
def _(weights: list[Tensor]) -> Tensor:
    return _floats(weights[0], len(weights))


@register_fake("pissa::svd_lowrank")
def _(weight: Tensor, largest: float, r: int, svd: str, passes: int | None, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return _floats(weight, r, weight.shape[0]), _floats(weight, r), _floats(weight, r, weight.shape[1])


@register_fake("pissa::split")
def _(
    weight: Tensor, largest: float, r: int, scaling: float, svd: str, passes: int | None, seed: int
) -> tuple[Tensor, Tensor]:
    return _factors(weight, r)


@register_fake("pissa::split_many")
def _(
    weights: list[Tensor],
    largest: list[float],
    ranks: list[int],
    scalings: list[float],
    svd: str,
    passes: int | None,
    seed: int,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    a0, b0 = zip(*map(_factors, weights, ranks), strict=True)
    return list(a0), list(b0), [_floats(weight, r) for weight, r in zip(weights, ranks, strict=True)]


@register_fake("pissa::quantization_error")
def _(
    weight: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    format: str,
    blocksize: int,
    error: Tensor,
) -> Tensor:
    return weight.new_empty((), dtype=torch.float64)


@register_fake("pissa::split_quantized")
def _(
    weight: Tensor,
    largest: float,
    r: int,
    scaling: float,
    svd: str,
    passes: int | None,
    seed: int,
    format: str,
    blocksize: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*_factors(weight, r), *_quantized(weight, format, blocksize))


@register_fake("pissa::residual")
def _(weight: Tensor, a0: Tensor, b0: Tensor, scaling: float) -> Tensor:
    return weight.new_empty(weight.shape)


@register_fake("pissa::residual_quantized")
def _(weight: Tensor, a0: Tensor, b0: Tensor, scaling: float, format: str, blocksize: int) -> tuple[Tensor, Tensor]:
    return _quantized(weight, format, blocksize)


@register_fake("pissa::quantize")
def _(weight: Tensor, format: str, blocksize: int) -> tuple[Tensor, Tensor]:
    return _quantized(weight, format, blocksize)


@register_fake("pissa::quantize_absmax")
def _(absmax: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _bytes(absmax, absmax.numel()), _floats(absmax, -(-absmax.numel() // NESTED_BLOCKSIZE)), _floats(absmax)


@register_fake("pissa::dequantize")
def _(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    format: str,
    blocksize: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((rows, cols), dtype=dtype)


# The ops that multiply have the same arguments, but for what holds the weight: the dense weight; or, of a quantised
# one, four tensors, the format, the block size and out_features. Its last part tells the number of rows.


def _out_features(weight: list[Any]) -> int:
    rows: int = weight[-1].shape[0] if isinstance(weight[-1], Tensor) else weight[-1]
    return rows


def _kept(x: Tensor, out_features: int, a: Tensor | None, a0: Tensor | None, implicit: bool) -> Tensor:
    """What the forward keeps for the backward: x Aᵀ, behind, on CUDA, sums of factors in x's half precision."""
    if a is None:
        return _floats(x, 0)
    tokens, r = x.numel() // x.shape[-1], a.shape[0]
    has_sums = a0 is not None and x.is_cuda and x.dtype != torch.float32 and tokens > _FEW_TOKENS
    halves = r * (x.shape[-1] + (0 if implicit else out_features)) if has_sums else 0
    return _floats(x, -(-halves // 8) * 4 + tokens * r)


def _fake_linear(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *weight, _bias, a, _b, a0, _b0, _scaling, implicit = args
    out_features = _out_features(weight)
    return x.new_empty((*x.shape[:-1], out_features)), _kept(x, out_features, a, a0, implicit)


def _fake_gradients(x: Tensor, out_features: int, a: Tensor | None, need_dx: bool) -> tuple[Tensor, Tensor, Tensor]:
    r, rows, cols = (a.shape[0], out_features, x.shape[-1]) if a is not None else (0, 0, 0)
    return x.new_empty(x.shape if need_dx else (0,)), _floats(x, r, cols), _floats(x, rows, r)


def _fake_linear_backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *weight, a, _b, _a0, _b0, _kept, _scaling, _implicit, need_dx = args
    return _fake_gradients(x, _out_features(weight), a, need_dx)


for _op in ("linear", "quantized_linear"):
    register_fake(f"pissa::{_op}", _fake_linear)
    register_fake(f"pissa::{_op}_backward", _fake_linear_backward)


@register_fake("pissa::add_low_rank")
def _(
    base: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    a0: Tensor | None,
    b0: Tensor | None,
    scaling: float,
    implicit: bool,
) -> tuple[Tensor, Tensor]:
    return base.new_empty(base.shape), _kept(x, base.shape[-1], a, a0, implicit)


@register_fake("pissa::add_low_rank_backward")
def _(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    a0: Tensor | None,
    b0: Tensor | None,
    kept: Tensor,
    scaling: float,
    implicit: bool,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(x, dy.shape[-1], a, need_dx)


# ---- Gradients -------------------------------------------------------------------------------------------------------
# Saved for the backward: x and what the forward keeps.

_TAIL = 7  # arguments behind the weight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *weight = inputs[:-_TAIL]
    _, *factors, scaling, implicit = inputs[-_TAIL:]
    _, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)
    ctx.weight_tensors = sum(value is None or isinstance(value, Tensor) for value in weight)
    ctx.save_for_backward(x, kept, *weight[: ctx.weight_tensors], *factors)
    ctx.weight_numbers = weight[ctx.weight_tensors :]
    ctx.scaling, ctx.implicit = scaling, implicit
    ctx.has_adapter = factors[0] is not None


def _backward(op: Any, ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    weight_slots = [None] * (ctx.weight_tensors + len(ctx.weight_numbers))
    if dy is None:
        return (None, *weight_slots, *[None] * _TAIL)
    x, kept, *saved = ctx.saved_tensors
    weight, factors = saved[: ctx.weight_tensors], saved[ctx.weight_tensors :]
    need_dx = ctx.needs_input_grad[0]
    need_bias, need_a, need_b = ctx.needs_input_grad[-_TAIL : -_TAIL + 3]
    bias_grad = dy.flatten(0, -2).sum(0) if need_bias else None
    dx, grad_a, grad_b = op(dy, x, *weight, *ctx.weight_numbers, *factors, kept, ctx.scaling, ctx.implicit, need_dx)
    return (
        dx if need_dx else None,
        *weight_slots,
        bias_grad,
        grad_a if need_a else None,
        grad_b if need_b else None,
        *[None] * (_TAIL - 3),
    )


def _low_rank_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, x, *factors, scaling, implicit = inputs
    _, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, kept, *factors)
    ctx.scaling, ctx.implicit = scaling, implicit


def _low_rank_backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    x, kept, *factors = ctx.saved_tensors
    need_base, need_dx, need_a, need_b = ctx.needs_input_grad[:4]
    dx, grad_a, grad_b = torch.ops.pissa.add_low_rank_backward(
        dy, x, *factors, kept, ctx.scaling, ctx.implicit, need_dx
    )
    return (
        dy if need_base else None,
        dx if need_dx else None,
        grad_a if need_a else None,
        grad_b if need_b else None,
        *(None,) * 4,
    )


for _op in ("linear", "quantized_linear"):
    _gradients = partial(_backward, getattr(torch.ops.pissa, f"{_op}_backward"))
    register_autograd(f"pissa::{_op}", _gradients, setup_context=_setup_context)
register_autograd("pissa::add_low_rank", _low_rank_backward, setup_context=_low_rank_setup_context)
