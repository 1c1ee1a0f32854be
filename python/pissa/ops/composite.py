"""The ops in PyTorch's operations, for devices on which no kernel of ours computes: AMD's and Intel's GPUs, Apple's,
and NVIDIA's with a torch for CUDA 12.

Products decode the weight in chunks, forward and backward. What is computed once, the start and codes, is computed on
the CPU, so that a start has the same bits everywhere. `PISSA_COMPOSITE=1` takes the products from here on every device.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from pissa.notices import CompositeWarning
from pissa.ops import _autograd, _load
from pissa.ops._decode import Codes

_CHUNK = 32 << 20
"""Bytes of a weight in float32, or of logits, at a time."""


def _chunks(held: Sequence[Any], cols: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight in an op's arguments, and where they are. A dense weight is one chunk."""
    rows = _autograd.out_features_of(held)
    if len(held) == 1 or cols == 0:
        yield slice(rows), (held[0] if len(held) == 1 else held[0].new_empty(rows, 0)).to(dtype)
        return
    codes = Codes(*held, cols)
    step = max(1, _CHUNK // (4 * cols * codes.together)) * codes.together
    for first in range(0, rows, step):
        last = min(first + step, rows)
        yield slice(first, last), codes.decode(first, last).to(dtype)


def _dequantize(*args: Any) -> Tensor:
    *held, cols, dtype = args
    return torch.cat([rows for _, rows in _chunks(held, cols, dtype)])


def _dequantize_rows(*args: Any) -> Tensor:
    return Codes(*args[:-2]).look_up(args[-2]).to(args[-1])


# ---- Products --------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """x [..., n] as a matrix."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()


def _times(x: Tensor, held: Sequence[Any]) -> Tensor:
    """x Wᵀ in x's dtype, so rounded before anything is added; our kernels round the sum alone. A GPU multiplies several
    times as fast in half precision as in float32."""
    y = x.new_empty(len(x), _autograd.out_features_of(held))
    for place, rows in _chunks(held, x.shape[1], x.dtype):
        y[:, place] = x @ rows.T
    return y


def _times_back(dy: Tensor, held: Sequence[Any], cols: int) -> Tensor:
    """dy W: the chunks' products, which are in dy's dtype, summed in float32."""
    dx = dy.new_zeros(len(dy), cols, dtype=torch.float32)
    for place, rows in _chunks(held, cols, dy.dtype):
        dx += dy[:, place] @ rows
    return dx


def _pairs(a: Tensor, b: Tensor, a0: Tensor | None, b0: Tensor | None, implicit: bool) -> list[tuple[Tensor, Tensor]]:
    """Factors whose products are the adapter's part. The first A, and the sum of all B, are the whole ones."""
    if a0 is None or b0 is None:
        return [(a, b)]
    return [(a0 + a, b), (a, b0)] if implicit else [(a0 + a, b0 + b)]


def _sum(base: Tensor, bias: Tensor | None, x: Tensor, *args: Any) -> Tensor:
    """base + bias + the adapter's part, added in float32, for x [tokens, in]."""
    a, b, a0, b0, scaling, implicit = args
    total = base.float() if bias is None else base.float() + bias.float()
    for of_a, of_b in () if a is None else _pairs(a, b, a0, b0, implicit):
        total = total + scaling * (x.float() @ of_a.T @ of_b.T)
    return total.to(base.dtype)


# int8 is for processors: what has no kernels of ours computes as without it.


def _linear(x: Tensor, *args: Any, int8: bool = False) -> tuple[Tensor, Tensor]:
    *held, bias, a, b, a0, b0, scaling, implicit = args
    rows = _rows(x)
    y = _sum(_times(rows, held), bias, rows, a, b, a0, b0, scaling, implicit)
    return y.view(*x.shape[:-1], y.shape[1]), _autograd.kept_of(x, y.shape[1], a, a0, implicit).zero_()


def _linear_backward(dy: Tensor, x: Tensor, *args: Any, int8: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """x Aᵀ, which takes little, is computed again: `kept` is only for our kernels."""
    *held, a, b, a0, b0, _kept, scaling, implicit, need_dx = args
    rows, of_y = _rows(x), _rows(dy)
    dx = rows.new_zeros(rows.shape, dtype=torch.float32) if need_dx else rows.new_empty(0)
    if need_dx and held:
        dx += _times_back(of_y.to(x.dtype), held, x.shape[-1])
    grad_a = grad_b = rows.new_empty(0, 0, dtype=torch.float32)
    if a is not None:
        pairs, rows, of_y = _pairs(a, b, a0, b0, implicit), rows.float(), scaling * of_y.float()
        if need_dx:
            dx += sum(of_y @ of_b @ of_a for of_a, of_b in pairs)
        grad_a = (of_y @ sum(of_b for _, of_b in pairs)).T @ rows
        grad_b = of_y.T @ (rows @ pairs[0][0].T)
    return dx.to(x.dtype).view(x.shape) if need_dx else dx, grad_a, grad_b


def _add_low_rank(base: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    a, _b, a0, _b0, _scaling, implicit = args
    rows = _rows(x)
    y = _sum(_rows(base), None, rows, *args)
    return y.view(base.shape), _autograd.kept_of(x, base.shape[-1], a, a0, implicit).zero_()


def _layers(offsets: Sequence[int], args: Sequence[Any]) -> Iterator[tuple[slice, list[Any]]]:
    """The rows of each layer of a group, and its arguments: where these are lists, its item."""
    for i, (first, last) in enumerate(pairwise(offsets)):
        yield slice(first, last), [value[i] if isinstance(value, (list, tuple)) else value for value in args]


def _grouped_linear(x: Tensor, offsets: list[int], *args: Any, int8: bool = False) -> tuple[Tensor, Tensor]:
    layers = _layers(offsets, (*args[:7], None, *args[7:], False))
    outputs = [_linear(x[rows], *of_layer)[0] for rows, of_layer in layers]
    return torch.cat(outputs), x.new_zeros(len(x), len(args[7][0]), dtype=torch.float32)


def _grouped_linear_backward(
    dy: Tensor, x: Tensor, offsets: list[int], *args: Any, int8: bool = False
) -> tuple[Any, ...]:
    layers = _layers(offsets, (*args[:-1], False, args[-1]))
    dx, *grads = zip(*(_linear_backward(dy[rows], x[rows], *of_layer) for rows, of_layer in layers), strict=True)
    return torch.cat(dx), *map(list, grads)


def _token_scores(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *held, bias, labels, scale, cap, need_dx = args
    vocabulary = _autograd.out_features_of(held)
    rows, labels = _rows(x), labels.flatten()
    scores = rows.new_empty(len(rows), _autograd.SCORES, dtype=torch.float32)
    dx = torch.empty_like(rows) if need_dx else x.new_empty(0)
    step = max(1, _CHUNK // (4 * vocabulary))
    for first in range(0, len(rows), step):
        place = slice(first, first + step)
        z = _times(rows[place], held).float()
        z = scale * (z if bias is None else z + bias.float())
        slope = torch.full_like(z, scale)
        if cap > 0:
            bent = torch.tanh(z / cap)
            z, slope = cap * bent, scale * (1 - bent * bent)
        label = labels[place, None]
        known = (label >= 0) & (label < vocabulary)
        label = label.clamp(0, vocabulary - 1)
        log_p = z.log_softmax(-1)
        p = log_p.exp()
        of_label = log_p.gather(1, label).masked_fill(~known, math.nan)
        entropy = -(p * log_p).sum(-1)
        top1 = z.gather(1, label)[:, 0] >= z.amax(-1)
        scores[place] = torch.stack([of_label[:, 0], entropy, (2 * log_p).logsumexp(-1), z.mean(-1), top1.float()], -1)
        if need_dx:
            gradient = (torch.zeros_like(p).scatter_(1, label, 1.0) - p) * slope
            dx[place] = _times_back(gradient.masked_fill(~known, math.nan).to(x.dtype), held, x.shape[-1]).to(x.dtype)
    return scores.view(*x.shape[:-1], _autograd.SCORES), dx.view(x.shape) if need_dx else dx


def _add_second_moment(total: Tensor, x: Tensor) -> None:
    total += (x.float().T @ x.float()).tril()


# ---- Registration ----------------------------------------------------------------------------------------------------


def _on_cpu(op: Any, *args: Any) -> Any:
    """The op's result by the CPU's kernel, with what it writes to, on the device of its arguments."""
    moved = tree_map_only(Tensor, Tensor.cpu, args)
    result = op(*moved)
    for argument, value, there in zip(op._schema.arguments, args, moved, strict=False):
        if argument.alias_info is not None:
            value.copy_(there)
    return tree_map_only(Tensor, lambda tensor: tensor.to(_first(args).device), result)


def _first(args: Sequence[Any]) -> Any:
    return tree_leaves(args[0])[0]


_PRODUCTS: dict[str, Callable[..., Any]] = {
    "max_abs": lambda weights: torch.stack([weight.abs().amax().float() for weight in weights]),
    "add_second_moment": _add_second_moment,
    "dequantize": _dequantize,
    "dequantize_rows": _dequantize_rows,
    "linear": _linear,
    "linear_backward": _linear_backward,
    "grouped_linear": _grouped_linear,
    "grouped_linear_backward": _grouped_linear_backward,
    "add_low_rank": _add_low_rank,
    "add_low_rank_backward": _linear_backward,
    "token_scores": _token_scores,
}
_PRODUCTS |= {f"quantized_{op}": _PRODUCTS[op] for op in ("linear", "linear_backward", "token_scores")}
_ONCE: tuple[str, ...] = ("svd_lowrank", "split_many", "residual", "residual_quantized", "quantize", "quantize_absmax")
_ONCE += ("feedback_codes", "merge_codes", "quantization_error")

_announced: set[torch.device] = set()


def _announcing(compute: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The result of `compute`, after saying, once for each device, what computes there."""
    device = _first(args).device
    if device not in _announced:
        _announced.add(device)
        why = _load.cuda_problem if device.type == "cuda" else "they are for the CPU and CUDA"
        reason = "PISSA_COMPOSITE=1 is set" if _load.FORCED else f"pissa's kernels do not: {why}"
        warnings.warn(
            f"on {device} PyTorch's operations compute pissa's layers ({reason}). Results are the same up to rounding. "
            "Each pass decodes the weight into memory first, so that a step may take several times as long. If it "
            "fails, please report it with what `pissa env` prints",
            CompositeWarning,
            stacklevel=2,
        )
    with torch._C._DisableAutocast():
        return compute(*args, **options)


_LIBRARY: Any = torch.library.Library("pissa", "IMPL")  # type: ignore[no-untyped-call, unused-ignore]


def _register(key: str, ops: Mapping[str, Callable[..., Any]]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"(?i).*overrid", UserWarning)
        for op, compute in ops.items():
            _LIBRARY.impl(op, partial(_announcing, compute), key, allow_override=True)


for _key in ("XPU", "MPS", "MTIA", "HPU", "PrivateUse1", *(("CUDA",) if _load.cuda_problem or _load.FORCED else ())):
    _register(_key, _PRODUCTS | {op: partial(_on_cpu, getattr(torch.ops.pissa, op).default) for op in _ONCE})
if _load.FORCED:
    _register("CPU", _PRODUCTS)
