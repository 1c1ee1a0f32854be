"""The residual of a weight, what remains of it without its principal part: dense, or quantised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pissa.ops import _autograd  # noqa: F401  registers fakes and gradients
from pissa.ops._quant import QuantizedWeight, check_offset, quantized_weight
from pissa.ops.checks import (
    check_choice,
    check_devices,
    check_factors,
    check_lengths,
    check_matrix,
    check_product,
    check_scaling,
)
from pissa.ops.formats import FORMATS

_OPS = torch.ops.pissa


def residual(
    weight: Tensor,
    a0: Tensor,
    b0: Tensor,
    *,
    scaling: float = 1.0,
    form: str = "explicit",
    blocksize: int | None = None,
    double_quant: bool | None = None,
) -> Tensor | QuantizedWeight:
    """`weight - scaling * b0 @ a0` for given factors, with the bits that `split` gives.

    Args:
        weight: [out, in], float32, bfloat16 or float16, finite.
        a0, b0: float32 [r, in] and [out, r].
        form: "explicit" (in the weight's dtype) or one of `formats.FORMATS`.
        blocksize, double_quant: of a quantised format; see `quantize`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_scaling(scaling)
    [found] = _residuals([("weight", "a0", "b0")], [weight], [a0], [b0], [scaling], form, blocksize, double_quant)
    return found


def residual_many(
    weights: Sequence[Tensor],
    a0s: Sequence[Tensor],
    b0s: Sequence[Tensor],
    scalings: Sequence[float],
    *,
    form: str = "explicit",
    blocksize: int | None = None,
    double_quant: bool | None = None,
    names: Sequence[str] | None = None,
) -> list[Tensor | QuantizedWeight]:
    """`residual` of many weights, bit for bit. The host waits once for a GPU, when all of them are queued.

    Args:
        weights, a0s, b0s, scalings: what `residual` takes, for each weight; on one device.
        form, blocksize, double_quant: see `residual`; the same for all.
        names: what errors call the weights; "weights[0]", "weights[1]", ... by default.

    Raises:
        TypeError, ValueError: naming the argument. No residual is returned then.
    """
    names = [f"weights[{i}]" for i in range(len(weights))] if names is None else names
    check_lengths({"a0s": a0s, "b0s": b0s, "scalings": scalings, "names": names}, len(weights))
    for i, scaling in enumerate(scalings):
        check_scaling(scaling, f"scalings[{i}]")
    called = [(name, f"a0s[{i}]", f"b0s[{i}]") for i, name in enumerate(names)]
    return _residuals(called, weights, a0s, b0s, scalings, form, blocksize, double_quant)


def _residuals(
    names: Sequence[tuple[str, str, str]],
    weights: Sequence[Tensor],
    a0s: Sequence[Tensor],
    b0s: Sequence[Tensor],
    scalings: Sequence[float],
    form: str,
    blocksize: int | None,
    double_quant: bool | None,
) -> list[Tensor | QuantizedWeight]:
    """The residuals; `names` has those of a weight, of its a0 and its b0."""
    tensors = {}
    weights = list(weights)
    for i, (triple, name) in enumerate(zip(zip(weights, a0s, b0s, strict=True), names, strict=True)):
        weights[i] = check_matrix(triple[0], name[0])
        check_factors(name[1], triple[1], name[2], triple[2], weights[i].shape[0], weights[i].shape[1])
        tensors |= zip(name, triple, strict=True)
    check_devices(tensors)
    if not weights:
        return []
    options = [quant_options(form, ("explicit",), blocksize, double_quant, weight) for weight in weights]
    factors = [(a0.detach().float(), b0.detach().float()) for a0, b0 in zip(a0s, b0s, strict=True)]
    bounds = [_bounds(weight, *pair) for weight, pair in zip(weights, factors, strict=True)]
    found = [
        unchecked_residual(weight, *pair, scaling, form, option)
        for weight, pair, scaling, option in zip(weights, factors, scalings, options, strict=True)
    ]
    offsets = [residual.offset for residual in found if isinstance(residual, QuantizedWeight) and residual.nested]
    # The one wait: all is queued.
    values = torch.stack([*(bound for three in bounds for bound in three), *(o.double() for o in offsets)]).tolist()
    for i, (name, scaling) in enumerate(zip(names, scalings, strict=True)):
        check_product(name, *values[3 * i : 3 * i + 3], scaling)
    for name, offset in zip(names, values[3 * len(weights) :], strict=False):
        check_offset(offset, name[0])
    return found


def _bounds(weight: Tensor, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """max|weight|, which is NaN if the weight has one, and the norms of the factors, float64 []."""
    least, most = weight.aminmax()
    norm_a, norm_b = (torch.linalg.vector_norm(factor, dtype=torch.float64) for factor in (a0, b0))
    return torch.maximum(-least, most).double(), norm_a, norm_b


def unchecked_residual(
    weight: Tensor, a0: Tensor, b0: Tensor, scaling: float, form: str, options: tuple[int, bool] | None
) -> Tensor | QuantizedWeight:
    """The residual of tensors that are fit for it, `options` being `quant_options`. If the scales are nested, their
    offset has to be checked by the caller, who may wait for it."""
    if options is None:
        rest: Tensor = _OPS.residual(weight, a0, b0, scaling)
        return rest
    blocksize, double_quant = options
    codes, absmax = _OPS.residual_quantized(weight, a0, b0, scaling, form, blocksize)
    return quantized_weight(form, codes, absmax, (weight.shape[0], weight.shape[1]), blocksize, double_quant)


def quant_options(
    form: str, others: tuple[str, ...], blocksize: int | None, double_quant: bool | None, weight: Tensor
) -> tuple[int, bool] | None:
    """Block size and double quantisation of a quantised form; None of the others, which have neither."""
    check_choice("form", form, (*others, *FORMATS))
    if form in FORMATS:
        return FORMATS[form].options(blocksize, double_quant, weight.shape[1])
    for name, value in {"blocksize": blocksize, "double_quant": double_quant}.items():
        if value is not None:
            raise ValueError(f"{name}: got {value!r} with form={form!r}; allowed with {', '.join(map(repr, FORMATS))}")
    return None
