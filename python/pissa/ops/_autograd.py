"""Fakes (shapes and dtypes for torch.compile) and gradients of torch.ops.pissa.*. The kernels are compiled code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from pissa.ops._load import _C  # importing it defines the ops
from pissa.ops.checks import check_devices
from pissa.ops.formats import FORMATS, NESTED_BLOCKSIZE

_FEW_TOKENS: int = _C.limits()["few_tokens"]
SCORES: int = _C.limits()["scores"]

# ---- Fakes -----------------------------------------------------------------------------------------------------------
# torch calls each with all arguments of its op, by position.


def _bytes(like: Tensor, count: int) -> Tensor:
    return like.new_empty(count, dtype=torch.uint8)


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _triplets(weight: Tensor, r: int) -> tuple[tuple[int, ...], ...]:
    return (r, weight.shape[0]), (r,), (r, weight.shape[1])


def _split(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    return _floats(weight, r, weight.shape[1]), _floats(weight, weight.shape[0], r), _floats(weight, r)


def _turned(x: Tensor, dim: int) -> Tensor:
    """[batch, length, heads, dim] for heads [batch, heads, length, ...]."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], dim)


def _quantized(weight: Tensor, format: str, blocksize: int) -> tuple[Tensor, Tensor]:
    parts = FORMATS[format].tensors((weight.shape[0], weight.shape[1]), blocksize, double_quant=False)
    return _bytes(weight, parts["codes"][0][0]), _floats(weight, *parts["absmax"][0])


_FAKES: dict[str, Callable[..., Any]] = {
    "max_abs": lambda weights: _floats(weights[0], len(weights)),
    "svd_lowrank": lambda weight, _, r, *__: tuple(_floats(weight, *shape) for shape in _triplets(weight, r)),
    "split_many": lambda weights, _, ranks, *__: tuple(map(list, zip(*map(_split, weights, ranks), strict=True))),
    "quantization_error": lambda weight, *_: weight.new_empty((), dtype=torch.float64),
    "add_second_moment": lambda total, x: None,
    "residual": lambda weight, *_: weight.new_empty(weight.shape),
    "residual_quantized": lambda weight, a0, b0, scaling, format, blocksize: _quantized(weight, format, blocksize),
    "quantize": lambda weight, format, blocksize, _=None: _quantized(weight, format, blocksize),
    "feedback_codes": lambda weight, lower, *others: _quantized(weight, *others[-2:])[0],
    "merge_codes": lambda codes, *_: (codes.new_empty(codes.numel()), codes.new_empty(4, dtype=torch.float64)),
    "quantize_absmax": lambda absmax, _: (
        _bytes(absmax, absmax.numel()),
        _floats(absmax, -(-absmax.numel() // NESTED_BLOCKSIZE)),
        _floats(absmax),
    ),
    "dequantize": lambda codes, *others: codes.new_empty(others[-3:-1], dtype=others[-1]),
    "dequantize_rows": lambda codes, *others: codes.new_empty((*others[-2].shape, others[-3]), dtype=others[-1]),
    "rms_norm": lambda x, *_: (x.new_empty(x.shape), _floats(x, *x.shape[:-1])),
    "rms_norm_backward": lambda dy, x, *_: x.new_empty(x.shape),
    "gated": lambda gate, *_: gate.new_empty(gate.shape),
    "gated_backward": lambda dy, gate, *_: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
    "attention": lambda q, k, v, *_: (_turned(q, v.shape[-1]), _floats(q, *q.shape[:3])),
    "attention_backward": lambda dout, q, k, v, *_: tuple(_turned(x, x.shape[-1]) for x in (q, k, v)),
}
for _op, _fake in _FAKES.items():
    register_fake(f"pissa::{_op}", _fake)


# The ops that multiply have the same arguments except for the weight: either a dense weight, or four tensors, the
# format, the block size and out_features of a quantised one. The last of these gives the number of rows.


class _Last(NamedTuple):
    """The last arguments of `linear`, `quantized_linear` and `add_low_rank`, or something for each of them. The first
    is x, and the weight is between. add_low_rank has no weight, and base and x in the places of x and bias."""

    bias: Any
    a: Any
    b: Any
    a0: Any
    b0: Any
    scaling: Any
    implicit: Any


class _Group(NamedTuple):
    """The arguments of `grouped_linear`, or something for each of them."""

    x: Any
    offsets: Any
    codes: Any
    absmax: Any
    nested_absmax: Any
    offset: Any
    format: Any
    blocksize: Any
    out_features: Any
    a: Any
    b: Any
    a0: Any
    b0: Any
    scaling: Any


def _named(arguments: Sequence[Any]) -> tuple[Any, Sequence[Any], _Last]:
    """The arguments of an op that multiplies: the first, the weight, and the last."""
    count = len(_Last._fields)
    return arguments[0], arguments[1:-count], _Last(*arguments[-count:])


def out_features_of(weight: Sequence[Any]) -> int:
    rows: int = weight[-1].shape[0] if isinstance(weight[-1], Tensor) else weight[-1]
    return rows


def kept_of(x: Tensor, out_features: int, a: Tensor | None, a0: Tensor | None, implicit: bool) -> Tensor:
    """What the forward keeps for the backward: x Aᵀ; on CUDA in bfloat16 if x is, and after sums of factors in x's half
    precision."""
    if a is None:
        return _floats(x, 0)
    tokens, r = x.numel() // x.shape[-1], a.shape[0]
    if not x.is_cuda or x.dtype == torch.float32 or tokens <= _FEW_TOKENS:
        return _floats(x, tokens * r)
    sums = 0 if a0 is None else r * (x.shape[-1] + (0 if implicit else out_features))
    return _floats(x, -(-sums // 8) * 4 + (-(-tokens * r // 2) if x.dtype == torch.bfloat16 else tokens * r))


def _fake_linear(*args: Any, int8: bool = False) -> tuple[Tensor, Tensor]:
    check_devices(dict(enumerate(args)))  # as the kernels do
    x, weight, last = _named(args)
    out_features = out_features_of(weight)
    return x.new_empty((*x.shape[:-1], out_features)), kept_of(x, out_features, last.a, last.a0, last.implicit)


def _fake_gradients(x: Tensor, out_features: int, a: Tensor | None, need_dx: bool) -> tuple[Tensor, Tensor, Tensor]:
    r, rows, cols = (a.shape[0], out_features, x.shape[-1]) if a is not None else (0, 0, 0)
    return x.new_empty(x.shape if need_dx else (0,)), _floats(x, r, cols), _floats(x, rows, r)


def _fake_linear_backward(dy: Tensor, x: Tensor, *args: Any, int8: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    *weight, a, _b, _a0, _b0, _kept, _scaling, _implicit, need_dx = args
    return _fake_gradients(x, out_features_of(weight), a, need_dx)


for _op in ("linear", "quantized_linear"):
    register_fake(f"pissa::{_op}", _fake_linear)
    register_fake(f"pissa::{_op}_backward", _fake_linear_backward)


@register_fake("pissa::grouped_linear")
def _(*args: Any, int8: bool = False) -> tuple[Tensor, Tensor]:
    group = _Group(*args)
    x = group.x
    return x.new_empty(x.shape[0], group.out_features), _floats(x, x.shape[0], group.a[0].shape[0])


@register_fake("pissa::grouped_linear_backward")
def _(dy: Tensor, *args: Any, int8: bool = False) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    *operands, _kept, scaling, need_dx = args
    group = _Group._make([*operands, scaling])
    grads_a, grads_b = ([_floats(group.x, *factor.shape) for factor in factors] for factors in (group.a, group.b))
    return group.x.new_empty(group.x.shape if need_dx else (0,)), grads_a, grads_b


@register_fake("pissa::add_low_rank")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    check_devices(dict(enumerate(args)))
    base, _, last = _named(args)
    return base.new_empty(base.shape), kept_of(last.bias, base.shape[-1], last.a, last.a0, last.implicit)


@register_fake("pissa::add_low_rank_backward")
def _(dy: Tensor, x: Tensor, a: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(x, dy.shape[-1], a, need_dx=args[-1])


def _fake_token_scores(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _floats(x, *x.shape[:-1], SCORES), x.new_empty(x.shape if args[-1] else (0,))


for _op in ("token_scores", "quantized_token_scores"):
    register_fake(f"pissa::{_op}", _fake_token_scores)


# ---- Gradients -------------------------------------------------------------------------------------------------------


def _once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that raises where it would itself be differentiated. Torch would leave those gradients out."""

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "pissa's ops can be differentiated only once: got a backward pass with create_graph=True. Leave "
                "it out; for gradients of gradients, use torch's own operations, such as those of PEFT's LoRA layers"
            )
        return backward(ctx, *gradients)

    return checked


def _differentiate(op: str, backward: Callable[..., Any], save: Callable[..., None]) -> None:
    register_autograd(f"pissa::{op}", _once(backward), setup_context=save)


def _bias_gradient(dy: Tensor) -> Tensor:
    """The gradient [out] of a bias, for dy [..., out]."""
    return dy[None].flatten(0, -2).sum(0)


_Options = Mapping[str, Any]
"""The keywords of an op: int8, of those that multiply with a weight in codes."""
_NONE: _Options = {}


class _Gradients(NamedTuple):
    """How an op that multiplies is differentiated. x, the other operands and what the forward keeps are saved."""

    op: Any
    """Computes the gradients."""
    tensors: int
    """How many of the weight's arguments are tensors."""
    adds: bool
    """Whether it is `add_low_rank`."""

    def save(
        self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor], keyword_only_inputs: _Options = _NONE
    ) -> None:
        first, weight, last = _named(inputs)
        _, kept = output
        ctx.mark_non_differentiable(kept)
        ctx.set_materialize_grads(False)
        x = last.bias if self.adds else first
        ctx.save_for_backward(kept, x, last.a, last.b, last.a0, last.b0, *weight[: self.tensors])
        ctx.weight_numbers, ctx.numbers = weight[self.tensors :], (last.scaling, last.implicit)
        ctx.options = keyword_only_inputs

    def backward(self, ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        need_first, need_weight, need = _named(ctx.needs_input_grad)
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        kept, x, a, b, a0, b0, *weight = ctx.saved_tensors
        need_x = need.bias if self.adds else need_first
        operands = (dy, x, *weight, *ctx.weight_numbers, a, b, a0, b0, kept, *ctx.numbers, need_x)
        dx, grad_a, grad_b = self.op(*operands, **ctx.options)
        if self.adds:
            first, bias = dy, dx
        else:
            first, bias = dx, _bias_gradient(dy) if need.bias else None
        last = _Last(bias, grad_a, grad_b, None, None, None, None)
        in_last = (grad if needed else None for grad, needed in zip(last, need, strict=True))
        return first if need_first else None, *[None] * len(need_weight), *in_last


for _op, _tensors in (("linear", 1), ("quantized_linear", 4), ("add_low_rank", 0)):
    _gradients = _Gradients(getattr(torch.ops.pissa, f"{_op}_backward"), _tensors, adds=_op == "add_low_rank")
    _differentiate(_op, _gradients.backward, _gradients.save)


# A group's lists are saved one after the other, each of as many tensors as there are layers. Torch wants gradients in
# lists of the same lengths.

_GROUP_LISTS = ("codes", "absmax", "nested_absmax", "offset", "a", "b", "a0", "b0")


def _save_group(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor], keyword_only_inputs: _Options
) -> None:
    group, (_, kept) = _Group(*inputs), output
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)
    ctx.lists = [name for name in _GROUP_LISTS if getattr(group, name) is not None]
    ctx.others, ctx.options = group._replace(x=None, **dict.fromkeys(ctx.lists)), keyword_only_inputs
    ctx.save_for_backward(kept, group.x, *(tensor for name in ctx.lists for tensor in getattr(group, name)))


def _group_backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    kept, x, *tensors = ctx.saved_tensors
    count = len(tensors) // len(ctx.lists)
    gradients = _Group(*[None] * len(_Group._fields))._replace(**{name: [None] * count for name in ctx.lists})
    if dy is None:
        return tuple(gradients)
    lists = {name: tensors[number * count : (number + 1) * count] for number, name in enumerate(ctx.lists)}
    *operands, scaling = ctx.others._replace(x=x, **lists)
    needed = _Group(*ctx.needs_input_grad)
    dx, *grads = torch.ops.pissa.grouped_linear_backward(dy, *operands, kept, scaling, needed.x, **ctx.options)
    grads_a, grads_b = (
        [grad if need else None for grad, need in zip(*pair, strict=True)]
        for pair in zip(grads, (needed.a, needed.b), strict=True)
    )
    return tuple(gradients._replace(x=dx if needed.x else None, a=grads_a, b=grads_b))


_differentiate("grouped_linear", _group_backward, _save_group)


# Scores of tokens: the forward computes each token's d log p / dx at once. The other outputs have no gradient.


def _save_token_scores(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, dx = output
    ctx.mark_non_differentiable(dx)
    ctx.save_for_backward(dx)


def _token_scores_backward(ctx: Any, grad_scores: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (dx,) = ctx.saved_tensors
    return ((grad_scores[..., :1] * dx).to(dx.dtype), *[None] * (len(ctx.needs_input_grad) - 1))


for _op in ("token_scores", "quantized_token_scores"):
    _differentiate(_op, _token_scores_backward, _save_token_scores)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *operands, ctx.scale, ctx.causal = inputs
    out, log_sums = output
    ctx.mark_non_differentiable(log_sums)
    ctx.save_for_backward(*operands, out, log_sums)


def _attention_backward(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.pissa.attention_backward(dout, *ctx.saved_tensors, ctx.scale, ctx.causal)
    return (*(gradient.transpose(1, 2) for gradient in gradients), None, None, None)


def _save_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, ctx.offset, _eps = inputs
    _, scales = output
    ctx.mark_non_differentiable(scales)
    ctx.save_for_backward(x, weight, scales)


def _rms_norm_backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return torch.ops.pissa.rms_norm_backward(dy, *ctx.saved_tensors, ctx.offset), None, None, None


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _gated_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.pissa.gated_backward(dy, *ctx.saved_tensors, ctx.activation), None)


_differentiate("gated", _gated_backward, _save_gated)
_differentiate("rms_norm", _rms_norm_backward, _save_rms_norm)
_differentiate("attention", _attention_backward, _save_attention)


# ---- Two nodes of autograd's graph -----------------------------------------------------------------------------------
# The first node saves the operands of the linear op, and the second one computes. Activation checkpointing recomputes a
# block until its last operand is saved, and stops there. Therefore the last product of a block, whose output no
# gradient needs, is skipped; in a Llama block, that is 22% of the forward's products. x Aᵀ, 4 r bytes a token, stays
# with the second node, checkpointed or not, because recomputing it took 3% of a step.


def product(op: str, x: Tensor, weight: Sequence[Any], factors: tuple[Any, ...], *, int8: bool) -> Tensor:
    """`torch.ops.pissa.<op>(x, *weight, *factors)` without the output that the op keeps: in two nodes, if there is a
    graph, and it is not being traced. (On CUDA the forward also keeps sums of factors, which the backward would have to
    recompute.)"""
    options = {"int8": True} if int8 else {}
    operands = (*weight, *factors)  # one argument: as fifteen, they take 9 us more in the two nodes
    one_node = torch.compiler.is_compiling() or x.device.type != "cpu" or not torch.is_grad_enabled()
    if one_node or factors[1] is None or x.grad_fn is None:
        return run(op, x, *operands, **options)
    y: Tensor = _Product.apply(_Operands.apply(x, operands), *factors[:3], op, operands, options)  # type: ignore[no-untyped-call, unused-ignore]
    return y


def run(op: str, *arguments: Any, **options: Any) -> Tensor:
    """The first output of an op. Without gradients its node is passed by, which takes 9 of 22 us."""
    keeps_node = torch.is_grad_enabled() or torch.compiler.is_compiling()
    with nullcontext() if keeps_node else torch._C._AutoDispatchBelowAutograd():
        y: Tensor = getattr(torch.ops.pissa, op)(*arguments, **options)[0]
    return y


class _Operands(torch.autograd.Function):
    """Returns x unchanged. Saves it, and the tensors among the op's other arguments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operands: tuple[Any, ...]) -> Tensor:
        ctx.numbers = [None if isinstance(value, Tensor) else value for value in operands]
        ctx.save_for_backward(x, *(value if isinstance(value, Tensor) else None for value in operands))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


class _Product(torch.autograd.Function):
    """Calls the op on an x that comes from `_Operands`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        op: str,
        operands: tuple[Any, ...],
        options: _Options,
    ) -> Tensor:
        ctx.op, ctx.operands, ctx.options = op, x.grad_fn, options
        ctx.set_materialize_grads(False)
        y: Tensor
        with torch._C._AutoDispatchBelowAutograd():
            y, ctx.kept = getattr(torch.ops.pissa, op)(x, *operands, **options)
        return y

    @staticmethod
    @_once
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        if dy is None:
            return (None,) * 7
        x, *saved = ctx.operands.saved_tensors
        operands = [
            number if tensor is None else tensor for tensor, number in zip(saved, ctx.operands.numbers, strict=True)
        ]
        *weight, _, a, b, a0, b0, scaling, implicit = operands
        kept, ctx.kept = ctx.kept, None  # so that it lives no longer than what autograd saves
        if kept is None:  # a second backward
            kept = _kept_again(x, a, a0, scaling, implicit)
        backward = getattr(torch.ops.pissa, f"{ctx.op}_backward")
        dx, grad_a, grad_b = backward(dy, x, *weight, a, b, a0, b0, kept, scaling, implicit, True, **ctx.options)
        _, need_bias, need_a, need_b, *_ = ctx.needs_input_grad
        grad_bias = _bias_gradient(dy) if need_bias else None
        return dx, grad_bias, grad_a if need_a else None, grad_b if need_b else None, None, None, None


def _kept_again(x: Tensor, a: Tensor, a0: Tensor | None, scaling: float, implicit: bool) -> Tensor:
    """Recomputes what the op keeps for the backward, x Aᵀ, as a layer with the same a and one output keeps it."""
    b = a.new_zeros(1, len(a))
    y = x.new_empty(*x.shape[:-1], 1)
    kept: Tensor
    _, kept = torch.ops.pissa.add_low_rank(y, x, a, b, a0, None if a0 is None else b, scaling, implicit)
    return kept
