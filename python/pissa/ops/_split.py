"""PiSSA's split of a weight: start factors, and a residual in any form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pissa.ops._alternate import Alternation, Iterate, Task, alternate
from pissa.ops._quant import QuantizedWeight, check_offsets, check_quantized_offset, quantized_weight
from pissa.ops._residual import quant_options, unchecked_residual
from pissa.ops._svd import SvdOptions, unchecked_factors
from pissa.ops.checks import (
    check_alternation,
    check_lengths,
    check_rank,
    check_scaling,
    check_svd,
    check_weight_and_bound,
    check_weights,
)

_OPS = torch.ops.pissa

TOLERANCE = 1e-3
"""Of alternations, unless another is asked for. The fifth of nf4 gains 1 to 2 % at r = 16 and 64; at r = 128 some
weights have nothing left to gain by then (bench/compare/quant_iters.py)."""


class Split(NamedTuple):
    """PiSSA's split of a weight: `weight ~ residual + scaling * b0 @ a0`.

    `a0`: float32 [r, in], √(S/scaling) Vᵀ. `b0`: float32 [out, r], U √(S/scaling). `residual`: None (implicit: keep the
    weight itself), a tensor in the weight's dtype (explicit), or `QuantizedWeight` (QPiSSA). `taken`: None; or, after
    alternations, the factors (a [k, in], b [out, k]), float32, that the residual lacks instead of (a0, b0): it is
    `weight - scaling * b @ a`, quantised. They are those of the iterate before, or of rank k = 0.
    """

    a0: Tensor
    b0: Tensor
    residual: Tensor | QuantizedWeight | None
    taken: tuple[Tensor, Tensor] | None = None


def split(
    weight: Tensor,
    r: int,
    *,
    scaling: float = 1.0,
    svd: str = "krylov",
    passes: int | Literal["auto"] = "auto",
    seed: int = 0,
    form: str = "implicit",
    blocksize: int | None = None,
    double_quant: bool | None = None,
    quant_iters: int = 1,
    quantise_first: bool = False,
    tolerance: float = TOLERANCE,
) -> Split:
    """PiSSA's start factors of a weight and, if asked, its residual (arXiv 2404.02948, eq. 2-4 and 8).

    Args:
        weight: [out, in], float32, bfloat16 or float16, finite.
        r: 1 to min(out, in).
        svd: see `svd_lowrank`.
        passes: see `svd_lowrank`.
        seed: see `svd_lowrank`.
        scaling: the adapter's scale s, `lora_alpha / r`; the factors are √(S/s) Vᵀ and U √(S/s).
        form: of the residual: "implicit" (none is formed), "explicit" (W - s B0 A0 in the weight's dtype), or one of
            `formats.FORMATS` (the same, quantised without being stored).
        blocksize: of a quantised format; see `quantize`.
        double_quant: the same.
        quant_iters: T of a quantised format. 1: the residual Q = format(W - L) is of the factors of W, L = s B0 A0
            (QPiSSA, section 4). More: T times, Q = format(W - L), then L = the best approximation of W - Q (Algorithm
            1), which starts from the factors of W and costs T + 1 decompositions, all but the last with at most 8
            passes. The iterate with the least ‖W - Q - L‖ is the result.
        quantise_first: such alternations from L = 0, with T decompositions: LoftQ (arXiv 2310.08659).
        tolerance: alternations end when one makes ‖W - Q - L‖ smaller by less than this share of it; 0: never.

    Raises:
        TypeError, ValueError: naming the argument; the weight is never changed.
    """
    weight, largest = check_weight_and_bound(weight)
    check_rank(r, weight)
    svd_options = SvdOptions(svd, check_svd(svd, passes, seed), seed)
    check_scaling(scaling)
    options = quant_options(form, ("implicit", "explicit"), blocksize, double_quant, weight)
    check_alternation(quant_iters, quantise_first, tolerance, form)
    if quant_iters > 1 or quantise_first:
        how = Alternation(svd_options, form, blocksize, double_quant, quant_iters, quantise_first, tolerance)
        [iterate] = alternate([Task(weight, largest, r, scaling, "weight")], how)
        return _of(iterate)
    if svd == "exact":
        [(a0, b0, _)] = unchecked_factors([weight], [largest], [r], [scaling], svd_options)
    elif options is not None:
        size, nested = options
        a0, b0, codes, absmax = _OPS.split_quantized(weight, largest, r, scaling, *svd_options, form, size)
        found = quantized_weight(form, codes, absmax, (weight.shape[0], weight.shape[1]), size, nested)
        return Split(a0, b0, check_quantized_offset(found))
    else:
        a0, b0 = _OPS.split(weight, largest, r, scaling, *svd_options)
    if form == "implicit":
        return Split(a0, b0, None)
    rest = unchecked_residual(weight, a0, b0, scaling, form, options)
    return Split(a0, b0, check_quantized_offset(rest) if isinstance(rest, QuantizedWeight) else rest)


def split_many(
    weights: Sequence[Tensor],
    ranks: Sequence[int],
    scalings: Sequence[float],
    *,
    svd: str = "krylov",
    passes: int | Literal["auto"] = "auto",
    seed: int = 0,
    form: str = "implicit",
    blocksize: int | None = None,
    double_quant: bool | None = None,
    quant_iters: int = 1,
    quantise_first: bool = False,
    tolerance: float = TOLERANCE,
    names: Sequence[str] | None = None,
) -> list[Split]:
    """`split` of many weights, bit for bit, small weights side by side on one thread each.

    Args:
        weights: [out, in] each, of any shapes and dtypes that `split` takes, on one device. Alternations need memory
            for an error of each, as large as the weight, and for its codes twice.
        ranks: r of each weight.
        scalings: s of each weight.
        svd: see `svd_lowrank`; the same for all.
        passes: the same for all; "auto" is as many as each rank needs.
        seed: the same for all.
        form: see `split`; the same for all.
        blocksize: of a quantised format; the same for all.
        double_quant: of a quantised format; the same for all.
        quant_iters: see `split`; the same for all, but each weight's alternations end by themselves.
        quantise_first: see `split`; the same for all.
        tolerance: see `split`; the same for all.
        names: what errors call the weights; "weights[0]", "weights[1]", ... by default.

    Returns:
        What `split` returns, in the order of the weights.

    Raises:
        TypeError, ValueError: naming the argument, before anything is decomposed; the mean of a weight's scales that
            overflows, after that. The weights are never changed.
    """
    names = [f"weights[{i}]" for i in range(len(weights))] if names is None else names
    check_lengths({"ranks": ranks, "scalings": scalings, "names": names}, len(weights))
    svd_options = SvdOptions(svd, check_svd(svd, passes, seed), seed)
    check_alternation(quant_iters, quantise_first, tolerance, form)
    weights, largest = check_weights(weights, names)
    for i, (weight, r, scaling) in enumerate(zip(weights, ranks, scalings, strict=True)):
        check_rank(r, weight, f"ranks[{i}]")
        check_scaling(scaling, f"scalings[{i}]")
    options = [quant_options(form, ("implicit", "explicit"), blocksize, double_quant, weight) for weight in weights]
    if not weights:  # no tensor, by which torch would find the op's kernel
        return []
    if quant_iters > 1 or quantise_first:
        how = Alternation(svd_options, form, blocksize, double_quant, quant_iters, quantise_first, tolerance)
        tasks = [Task(*parts) for parts in zip(weights, largest, ranks, scalings, names, strict=True)]
        return [_of(iterate) for iterate in alternate(tasks, how)]
    factors = unchecked_factors(weights, largest, ranks, scalings, svd_options)
    if form == "implicit":
        return [Split(a0, b0, None) for a0, b0, _ in factors]
    rests = [
        unchecked_residual(weight, a0, b0, scaling, form, option)
        for weight, (a0, b0, _), scaling, option in zip(weights, factors, scalings, options, strict=True)
    ]
    check_offsets(rests, names)
    return [Split(a0, b0, rest) for (a0, b0, _), rest in zip(factors, rests, strict=True)]


def _of(iterate: Iterate) -> Split:
    return Split(iterate.factors.a0, iterate.factors.b0, iterate.residual, iterate.taken)
