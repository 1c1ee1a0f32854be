"""The residual of a weight, what remains of it without its principal part: dense, or quantised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pissa.ops import _autograd  # noqa: F401  registers fakes and gradients
from pissa.ops._quant import QuantizedWeight, check_offset, offsets_of, quantized_weight
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
        a0: float32 [r, in]. With r = 0 the residual is all of the weight.
        b0: float32 [out, r].
        form: "explicit" (in the weight's dtype) or one of `formats.FORMATS`.
        blocksize: of a quantised format; see `quantize`.
        double_quant: the same.

    Returns:
        [out, in], a tensor in the weight's dtype, or `QuantizedWeight`.

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
        weights: [out, in] each, as `residual` takes them; on one device.
        a0s: float32 [r, in], for each weight.
        b0s: float32 [out, r], for each weight.
        scalings: one for each weight.
        form: see `residual`; the same for all.
        blocksize: of a quantised format; the same for all.
        double_quant: of a quantised format; the same for all.
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
    weights = [check_matrix(weight, name) for weight, (name, _, _) in zip(weights, names, strict=True)]
    tensors: dict[str, Tensor | None] = {}
    for triple, name in zip(zip(weights, a0s, b0s, strict=True), names, strict=True):
        check_factors(name[1], triple[1], name[2], triple[2], triple[0].shape[0], triple[0].shape[1], least=0)
        tensors |= zip(name, triple, strict=True)
    check_devices(tensors)
    if not weights:
        return []
    options = [quant_options(form, ("explicit",), blocksize, double_quant, weight) for weight in weights]
    factors = [(a0.detach().float(), b0.detach().float()) for a0, b0 in zip(a0s, b0s, strict=True)]
    found = [
        unchecked_residual(weight, *pair, scaling, form, option)
        for weight, pair, scaling, option in zip(weights, factors, scalings, options, strict=True)
    ]
    norms = [_norms([pair[which] for pair in factors]) for which in range(2)]
    values = torch.stack([_OPS.max_abs(weights), *norms, offsets_of(found)]).tolist()  # the host waits here, once
    for name, scaling, largest, norm_a, norm_b, offset in zip(names, scalings, *values, strict=True):
        check_product(name, largest, norm_a, norm_b, scaling)
        check_offset(offset, name[0])
    return found


def _norms(factors: Sequence[Tensor]) -> Tensor:
    """float64 [n]: they may overflow float32."""
    return torch.stack([torch.linalg.vector_norm(factor, dtype=torch.float64) for factor in factors])


def unchecked_residual(
    weight: Tensor, a0: Tensor, b0: Tensor, scaling: float, form: str, options: tuple[int, bool] | None
) -> Tensor | QuantizedWeight:
    """The residual of tensors that are fit for it, `options` being `quant_options`. If the scales are nested, their
    offset has to be checked by the caller, who may wait for it."""
    if options is not None:
        return unchecked_quantized_residual(weight, a0, b0, scaling, form, options)
    rest: Tensor = _OPS.residual(weight, a0, b0, scaling) if a0.shape[0] > 0 else weight.clone()
    return rest


def unchecked_quantized_residual(
    weight: Tensor, a0: Tensor, b0: Tensor, scaling: float, form: str, options: tuple[int, bool]
) -> QuantizedWeight:
    """The same of a quantised form; the factors may be of rank 0."""
    blocksize, double_quant = options
    if a0.shape[0] > 0:
        codes, absmax = _OPS.residual_quantized(weight, a0, b0, scaling, form, blocksize)
    else:
        codes, absmax = _OPS.quantize(weight, form, blocksize)
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
