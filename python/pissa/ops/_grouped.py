"""Several linear layers in one op: the experts of a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pissa.ops._linear import as_float32, as_ops_take, check_adapter, check_operands
from pissa.ops._quant import QuantizedWeight, check_quantized
from pissa.ops.checks import check_change_scaling, check_devices, check_lengths, shape_error

_OPS = torch.ops.pissa


def grouped_linear(
    x: Tensor,
    weights: Sequence[QuantizedWeight],
    offsets: Sequence[int],
    *,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    a0: Sequence[Tensor] | None = None,
    b0: Sequence[Tensor] | None = None,
    scaling: float = 1.0,
    int8: bool = False,
) -> Tensor:
    """Computes several quantised linear layers of equal shape, each with its own adapter and its own rows of x. The
    result is `linear(x[offsets[i]:offsets[i + 1]], weights[i], a=a[i], ...)` of each layer i, concatenated.

    On CUDA this takes two launches for up to 128 layers, if no layer has more than 128 rows, x is bfloat16 or float16,
    the GPU's tensor cores know that dtype, and rows and blocks of the weights consist of whole lines of 32 elements at
    16 bytes. Otherwise, and on a CPU, the layers are computed one after the other, as are the gradients in x, a and b.
    A layer of up to 16 rows is bit-identical to `linear`; more rows are multiplied in another order.

    Args:
        x: [rows, in], float32, bfloat16 or float16, sorted by layer.
        weights: [out, in] for each layer, with the same format, shape, block size and kind of scales.
        offsets: where the rows of each layer begin, and the number of rows: ascending from 0. A layer may have no rows.
        a: [r, in] for each layer, trained, used in float32; r is the same for all layers.
        b: [out, r] for each layer, likewise.
        a0: [r, in] for each layer, frozen, used in float32; given with b0.
        b0: [out, r] for each layer, likewise.
        scaling: lora_alpha / r; any finite number.
        int8: as in `linear`, for layers of more than 16 rows.

    Returns:
        [rows, out], in x's dtype; under autocast in autocast's.

    Raises:
        TypeError, ValueError: naming the argument, or the layer by its number.
    """
    if not weights:
        raise ValueError("weights: got none; needed: that of one layer at least")
    check_lengths({"a": a, "b": b, "a0": a0, "b0": b0}, len(weights))
    check_change_scaling(scaling)
    check_operands(x, weights[0], None)
    x, _, slots = as_ops_take(x, weights[0])
    if x.dim() != 2:
        raise shape_error("x", x, "[rows, in]")
    _check_offsets(offsets, len(weights), len(x))
    absent = [None] * len(weights)
    factors = [
        _prepare_layer(layer, x, weight, weights[0], layer_factors)
        for layer, (weight, *layer_factors) in enumerate(zip(weights, a, b, a0 or absent, b0 or absent, strict=True))
    ]
    if len(ranks := {len(layer_factors[0]) for layer_factors in factors if layer_factors[0] is not None}) > 1:
        raise ValueError(f"a: got ranks {sorted(ranks)}; needed: one for all layers")
    columns = [*zip(*(weight[:4] for weight in weights), strict=True), *zip(*factors, strict=True)]
    lists = [None if column[0] is None else list(column) for column in columns]
    y: Tensor
    y, _ = _OPS.grouped_linear(x, list(offsets), *lists[:4], *slots[4:], *lists[4:], float(scaling), int8=int8)
    return y


def _prepare_layer(
    layer: int, x: Tensor, weight: QuantizedWeight, first: QuantizedWeight, factors: Sequence[Any]
) -> tuple[Tensor | None, ...]:
    """The factors of a layer in float32, after checking that they fit its weight, and that it is like the first."""
    try:
        check_quantized(weight)
        if (key := group_key(weight)) != group_key(first):
            raise ValueError("weight: got {} {}, blocksize {}, {} scales in {}; needed: what layer 0 has".format(*key))
        named = dict(zip(("a", "b", "a0", "b0"), factors, strict=True))
        check_adapter(named, *weight.shape)
        check_devices({"x": x, "weight": weight.codes, **named})
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {layer}: {error}") from None
    return tuple(map(as_float32, factors))


def group_key(weight: QuantizedWeight) -> tuple[object, ...]:
    """What the weights of a group have in common: format, shape, block size, and number and dtype of the scales."""
    return weight.format, list(weight.shape), weight.blocksize, weight.absmax.numel(), weight.absmax.dtype


def _check_offsets(offsets: Sequence[int], count: int, rows: int) -> None:
    if any(isinstance(offset, bool) or not isinstance(offset, int) for offset in offsets):
        raise TypeError(f"offsets: got {offsets!r}; needed: ints")
    ascending = all(low <= high for low, high in pairwise(offsets))
    if len(offsets) != count + 1 or offsets[0] != 0 or offsets[-1] != rows or not ascending:
        raise ValueError(f"offsets: got {list(offsets)}; needed: {count + 1} numbers, ascending from 0 to {rows}")
