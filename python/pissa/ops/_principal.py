"""The principal part of a weight, by truncated SVD, and the residual: the weight without its principal part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, linalg

from pissa.ops import _autograd  # noqa: F401  registers fakes and gradients
from pissa.ops._quant import (
    QuantizedWeight,
    check_feedback,
    check_offset,
    offsets_of,
    quantized_weight,
    unchecked_quantized,
    with_feedback,
)
from pissa.ops._second_moment import check_moments, feedback_factors
from pissa.ops.checks import (
    check_choice,
    check_devices,
    check_factors,
    check_lengths,
    check_matrix,
    check_product,
    check_rank,
    check_scaling,
    check_svd,
    check_weights,
)
from pissa.ops.formats import FORMATS

_OPS = torch.ops.pissa

# ---- The truncated SVD -----------------------------------------------------------------------------------------------


def svd_lowrank(
    weight: Tensor, r: int, *, svd: str = "krylov", passes: int | Literal["auto"] = "auto", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the leading `r` singular triplets of a weight, as `torch.svd_lowrank` does.

    Args:
        weight: [out, in], float32, bfloat16 or float16, finite. Read in place, never copied to float32.
        r: 1 to min(out, in).
        svd: "krylov" (block Krylov, arXiv 1504.05477) or "subspace" (Halko et al., arXiv 0909.4061; less memory for
            very large r).
        passes: number of passes over the weight, even. "auto" makes 10 up to r = 64, 12 up to 96 and 14 beyond, or 28
            with "subspace". On power-law spectra the factors then lose no more of the energy of the best rank-r part
            than those of `torch.svd_lowrank` with niter = 16, which makes 34 passes. Flatter spectra (noise with some
            directions above it) need two more passes for that. Fewer passes are faster and lose more.
        seed: seed of the ±1 test matrix (Philox), which is the same on every device. The same seed gives the same bits
            for any number of threads, and in every run on the same GPU.

    Returns:
        U [out, r], S [r] (descending), V [in, r], float32. U and V have orthonormal columns for a weight of any rank.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    [weight], [largest] = check_weights([weight], ["weight"])
    check_rank(r, weight)
    number = check_svd(svd, passes, seed)
    ut, s, vt = _OPS.svd_lowrank(weight, largest, r, svd, number, seed)
    return ut.mT, s, vt.mT


class Factors(NamedTuple):
    """The leading r singular triplets of a weight as start factors: `scaling * b0 @ a0` is its best rank-r
    approximation."""

    a0: Tensor
    """float32 [r, in], √(S/scaling) Vᵀ."""
    b0: Tensor
    """float32 [out, r], U √(S/scaling)."""
    s: Tensor
    """float32 [r], the singular values, descending."""


class SvdOptions(NamedTuple):
    """How weights are decomposed, after `checks.check_svd`."""

    svd: str
    passes: int | None
    seed: int


def unchecked_factors(
    weights: Sequence[Tensor],
    largest: Sequence[float],
    ranks: Sequence[int],
    scalings: Sequence[float],
    options: SvdOptions,
    second_moments: Sequence[Tensor] | None = None,
) -> list[Factors]:
    """Returns the start factors of one or more weights that have been checked; `largest` contains their largest
    elements. Small weights are decomposed side by side; on a GPU, those of one shape are decomposed together. With
    second moments, one for each weight, the factors are those of the approximations that lose least of the outputs."""
    lists = _OPS.split_many(weights, largest, ranks, scalings, *options, second_moments)
    return [Factors(*parts) for parts in zip(*lists, strict=True)]


# ---- Residuals -------------------------------------------------------------------------------------------------------


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
    second_moments: Sequence[Tensor] | None = None,
) -> list[Tensor | QuantizedWeight]:
    """Computes `weight - scaling * b0 @ a0` for given factors of many weights, with the same bits as `split_many`. The
    host waits for a GPU once, after all of them are queued.

    Args:
        weights: [out, in] each, float32, bfloat16 or float16, finite; all on one device.
        a0s: float32 [r, in] each. With r = 0 the residual is the whole weight.
        b0s: float32 [out, r] each.
        scalings: a positive number for each.
        form: "explicit" (in the weight's dtype) or one of `formats.FORMATS`; the same for all weights.
        blocksize, double_quant: for a quantised format; see `quantize`.
        names: names of the weights in errors (default: "weights[0]", "weights[1]", ...).
        second_moments: those of the weights' inputs, as `split_many` takes them. The codes of a quantised form
            are then found by error feedback. Weights that share one tensor share its factorisation.

    Returns:
        For each weight a tensor [out, in] in its dtype, or a `QuantizedWeight`.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. No residual is returned then.
    """
    names = [f"weights[{i}]" for i in range(len(weights))] if names is None else names
    lists = {"a0s": a0s, "b0s": b0s, "scalings": scalings, "names": names, "second_moments": second_moments}
    check_lengths(lists, len(weights))
    if not weights:
        return []
    weights = list(map(check_matrix, weights, names))
    tensors: dict[str, Tensor | None] = {}
    for name, weight, a0, b0, scaling in zip(names, weights, a0s, b0s, scalings, strict=True):
        check_scaling(scaling, f"scaling of {name}")
        check_factors(f"a0 of {name}", a0, f"b0 of {name}", b0, weight.shape[0], weight.shape[1], least=0)
        tensors |= {name: weight, f"a0 of {name}": a0, f"b0 of {name}": b0}
    check_devices(tensors)
    options = [quant_options(form, ("explicit",), blocksize, double_quant, weight) for weight in weights]
    factors = [(a0.detach().float(), b0.detach().float()) for a0, b0 in zip(a0s, b0s, strict=True)]
    feedback: Sequence[Tensor | None] = [None] * len(weights)
    if second_moments is not None:
        check_feedback(form, weights, names)
        feedback = feedback_factors(check_moments(second_moments, weights, names))
    residuals = [
        unchecked_residual(weight, *pair, scaling, form, option, factor)
        for weight, pair, scaling, option, factor in zip(weights, factors, scalings, options, feedback, strict=True)
    ]
    # In float64, because norms may overflow float32.
    sides = zip(*factors, strict=True)
    norms = [torch.stack([linalg.vector_norm(factor, dtype=torch.float64) for factor in side]) for side in sides]
    values = torch.stack([_OPS.max_abs(weights), *norms, offsets_of(residuals)]).tolist()  # the host waits here, once
    for name, scaling, largest, norm_a, norm_b, offset in zip(names, scalings, *values, strict=True):
        check_product((name, f"a0 of {name}", f"b0 of {name}"), largest, norm_a, norm_b, scaling)
        check_offset(offset, name)
    return residuals


def unchecked_residual(
    weight: Tensor,
    a0: Tensor,
    b0: Tensor,
    scaling: float,
    form: str,
    options: tuple[int, bool] | None,
    feedback: Tensor | None = None,
) -> Tensor | QuantizedWeight:
    """Returns the residual of tensors that have been checked. `options` is the result of `quant_options`. The factors
    may have rank 0. With `feedback`, from `feedback_factors`, codes are found by error feedback. If the scales are
    nested, the caller must check their offset, and may wait for it."""
    has_factors = a0.shape[0] > 0
    if options is None:
        rest: Tensor = _OPS.residual(weight, a0, b0, scaling) if has_factors else weight.clone()
        return rest
    blocksize, double_quant = options
    # With error feedback, codes depend on their neighbours, and NVFP4's scales depend on the largest element. Both need
    # the whole residual.
    if has_factors and (feedback is not None or FORMATS[form].scales == "e4m3"):
        weight, has_factors = _OPS.residual(weight.float(), a0, b0, scaling), False
    if has_factors:
        codes, absmax = _OPS.residual_quantized(weight, a0, b0, scaling, form, blocksize)
        nearest = quantized_weight(weight, form, codes, absmax, blocksize, double_quant)
    else:
        nearest, _ = unchecked_quantized(weight, form, blocksize, double_quant)
    return nearest if feedback is None else with_feedback(weight, nearest, feedback)


def quant_options(
    form: str, others: tuple[str, ...], blocksize: int | None, double_quant: bool | None, weight: Tensor
) -> tuple[int, bool] | None:
    """Returns block size and double quantisation of a quantised form, or None for other forms, which have neither."""
    check_choice("form", form, (*others, *FORMATS))
    if form in FORMATS:
        return FORMATS[form].options(blocksize, double_quant, weight.shape[1])
    for name, value in {"blocksize": blocksize, "double_quant": double_quant}.items():
        if value is not None:
            raise ValueError(f"{name}: got {value!r} with form={form!r}; allowed with {', '.join(map(repr, FORMATS))}")
    return None
