"""PiSSA's split of a weight: start factors, and a residual in any form. A quantised residual and its factors can be
alternated, as in QPiSSA with T > 1 (arXiv 2404.02948, Algorithm 1) and LoftQ.

    L_0 = the best rank-r approximation of W, or, where W is quantised first, 0
    Q_t = format(W - L_{t-1}),  L_t = the best rank-r approximation of the error W - Q_t,  for t = 1 to T

The result is the iterate (Q_t, L_t) with the least ‖W - Q_t - L_t‖. An error has the dtype of its weight, so that it is
decomposed at the same speed. In half precision this rounds the error, which costs nf4 less than 0.5 points of the error
removed. For int8, whose errors are 16 times smaller, it costs 5 points for a weight of 384 x 384 at r = 128, and less
the smaller r / size is.

With a second moment R = E[xᵀx] of the activations, approximations and iterates are compared by tr(M R Mᵀ), the mean
square of the outputs that a matrix M contributes (QERA, arXiv 2410.06040).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pissa.ops._principal import (
    Factors,
    SvdOptions,
    check_feedback,
    quant_options,
    unchecked_factors,
    unchecked_residual,
)
from pissa.ops._quant import QuantizedWeight, check_offset, offsets_of
from pissa.ops._second_moment import check_moments, feedback_factors
from pissa.ops.checks import (
    check_alternation,
    check_finite,
    check_lengths,
    check_rank,
    check_scaling,
    check_svd,
    check_weights,
)
from pissa.ops.low_rank import empty_factors

_OPS = torch.ops.pissa

TOLERANCE = 1e-3
"""The default tolerance of alternations. The fifth alternation of nf4 gains 1 to 2% at r = 16 and 64; at r = 128 some
weights have nothing left to gain by then (bench/compare/quant_iters.py)."""


class Split(NamedTuple):
    """PiSSA's split of a weight: `weight ~ residual + scaling * b0 @ a0`.

    `a0`: float32 [r, in], √(S/scaling) Vᵀ. `b0`: float32 [out, r], U √(S/scaling). `residual`: None (implicit: keep the
    weight itself), a tensor in the weight's dtype (explicit), or a `QuantizedWeight` (QPiSSA). `taken`: None, or, after
    alternations, the factors (a [k, in], b [out, k]), float32, that the residual lacks instead of (a0, b0): the
    residual is `weight - scaling * b @ a`, quantised. They are those of the previous iterate, or have rank k = 0.
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
    second_moment: Tensor | None = None,
    error_feedback: bool = False,
) -> Split:
    """Computes PiSSA's start factors of a weight and, on request, its residual (arXiv 2404.02948, eq. 2-4 and 8).

    Args:
        weight: [out, in], float32, bfloat16 or float16, finite.
        r: 1 to min(out, in).
        svd, passes, seed: see `svd_lowrank`.
        scaling: the adapter's scale s, `lora_alpha / r`; the factors are √(S/s) Vᵀ and U √(S/s).
        form: form of the residual: "implicit" (none is computed), "explicit" (W - s B0 A0 in the weight's dtype), or
            one of `formats.FORMATS` (the same, quantised without being stored).
        blocksize, double_quant: for a quantised format; see `quantize`.
        quant_iters: T for a quantised format. With 1, the residual is Q = format(W - L) for the factors of W, L = s B0
            A0 (QPiSSA, section 4). With more, the steps Q = format(W - L), then L = the best approximation of W - Q,
            are repeated T times (Algorithm 1). This starts from the factors of W and costs T + 1 decompositions, all
            but the last with at most 8 passes. The result is the iterate with the least ‖W - Q - L‖.
        quantise_first: start these alternations from L = 0, with T decompositions: LoftQ (arXiv 2310.08659).
        tolerance: alternations end when one reduces ‖W - Q - L‖ by less than this share of it; 0: never.
        second_moment: E[xᵀx] of the layer's inputs x, float32 [in, in], on the weight's device, symmetric and positive
            semi-definite, of any rank and scale. The product of the factors then loses least of the outputs (QERA,
            arXiv 2410.06040), and alternations are compared by the outputs. The moment is read half as often as the
            weight, plus once.
        error_feedback: with a second moment, find the codes of a quantised form by error feedback; see `quantize`.

    Returns:
        The factors and the residual, on the weight's device; see `Split` for shapes and dtypes.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. The weight is never changed.
    """
    svd_options = SvdOptions(svd, check_svd(svd, passes, seed), seed)
    how = _How(svd_options, form, blocksize, double_quant, quant_iters, quantise_first, tolerance, error_feedback)
    moments = None if second_moment is None else [second_moment]
    [found] = _splits([("weight", "r", "scaling", "second_moment")], [weight], [r], [scaling], moments, how)
    return found


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
    second_moments: Sequence[Tensor] | None = None,
    error_feedback: bool = False,
) -> list[Split]:
    """`split` for many weights, with the same bits. Small weights are split side by side, on one thread each.

    All other arguments are those of `split`, the same for all weights. "auto" makes as many passes as each rank needs,
    and each weight's alternations end independently.

    Args:
        weights: [out, in] each, of any shapes and dtypes that `split` takes, on one device. For each weight,
            alternations need memory for an error as large as the weight, and twice for its codes.
        ranks: r of each weight.
        scalings: s of each weight.
        names: names of the weights in errors (default: "weights[0]", "weights[1]", ...).
        second_moments: those of the weights' inputs. Weights that share one tensor share its factorisation.

    Returns:
        The results of `split`, in the order of the weights.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, before anything is decomposed. Afterwards:
            the mean of a weight's scales overflows. The weights are never changed.
    """
    names = [f"weights[{i}]" for i in range(len(weights))] if names is None else names
    check_lengths({"ranks": ranks, "scalings": scalings, "names": names}, len(weights))
    if second_moments is not None:
        check_lengths({"second_moments": second_moments}, len(weights))
    svd_options = SvdOptions(svd, check_svd(svd, passes, seed), seed)
    how = _How(svd_options, form, blocksize, double_quant, quant_iters, quantise_first, tolerance, error_feedback)
    called = [(name, f"ranks[{i}]", f"scalings[{i}]", f"second_moments[{i}]") for i, name in enumerate(names)]
    return _splits(called, weights, ranks, scalings, second_moments, how)


class _How(NamedTuple):
    """How weights are split. `split` describes each field."""

    svd: SvdOptions
    form: str
    blocksize: int | None
    double_quant: bool | None
    quant_iters: int
    quantise_first: bool
    tolerance: float
    error_feedback: bool


class _Task(NamedTuple):
    """A weight that has been checked and can be split."""

    weight: Tensor
    largest: float
    """The weight's largest element."""
    r: int
    scaling: float
    options: tuple[int, bool] | None
    """The result of `quant_options` for its residual."""
    name: str
    """The weight's name in errors."""
    moment: Tensor | None
    """The second moment of its inputs."""
    feedback: Tensor | None
    """The result of `feedback_factors`, for codes by error feedback."""


def _splits(
    names: Sequence[tuple[str, str, str, str]],
    weights: Sequence[Tensor],
    ranks: Sequence[int],
    scalings: Sequence[float],
    second_moments: Sequence[Tensor] | None,
    how: _How,
) -> list[Split]:
    """Returns the splits. `names` contains the names of each weight, its rank, its scaling and its second moment."""
    check_alternation(how.quant_iters, how.quantise_first, how.tolerance, how.form)
    weights, largest = check_weights(weights, [name for name, *_ in names])
    moments: Sequence[Tensor | None] = [None] * len(weights)
    feedback = moments
    if how.error_feedback:
        check_feedback(how.form, weights, [name for name, *_ in names])
        if second_moments is None:
            raise ValueError("error_feedback: got True without second_moment, by which it weighs errors; give both")
    if second_moments is not None:
        checked = check_moments(second_moments, weights, [name for *_, name in names], [name for name, *_ in names])
        moments, feedback = checked, feedback_factors(checked) if how.error_feedback else feedback
    tasks = []
    for (name, name_r, name_s, _), *parts, scaling, moment, factor in zip(
        names, weights, largest, ranks, scalings, moments, feedback, strict=True
    ):
        weight, bound, r = parts
        check_rank(r, weight, name_r)
        check_scaling(scaling, name_s)
        options = quant_options(how.form, ("implicit", "explicit"), how.blocksize, how.double_quant, weight)
        tasks.append(_Task(weight, bound, r, scaling, options, name, moment, factor))
    if not tasks:  # without a tensor, torch could not find the op's kernel
        return []
    if how.quant_iters > 1 or how.quantise_first:
        return _alternated(tasks, how)
    factors = _factors(tasks, weights, largest, [how.svd] * len(tasks))
    if how.form == "implicit":
        return [Split(a0, b0, None) for a0, b0, _ in factors]
    rests = [_residual(task, (a0, b0), how.form) for task, (a0, b0, _) in zip(tasks, factors, strict=True)]
    if any(isinstance(rest, QuantizedWeight) and rest.nested for rest in rests):  # else no need to wait for a GPU
        for task, offset in zip(tasks, offsets_of(rests).tolist(), strict=True):
            check_offset(offset, task.name)
    return [Split(a0, b0, rest) for (a0, b0, _), rest in zip(factors, rests, strict=True)]


def _residual(task: _Task, taken: tuple[Tensor, Tensor], form: str) -> Tensor | QuantizedWeight:
    return unchecked_residual(task.weight, *taken, task.scaling, form, task.options, task.feedback)


# ---- Alternations ----------------------------------------------------------------------------------------------------


def _fast_passes(r: int) -> int:
    """The passes for factors that are only taken out of the weight. With T = 5, nf4 then loses at most 0.6 points of
    the error removed, compared with all passes; with 6 at r = 128 it would lose 2.3 (bench/compare/quant_iters.py)."""
    return 6 if r <= 64 else 8


def _fast(svd: SvdOptions, r: int) -> SvdOptions:
    """The same options with `_fast_passes`, if there are more."""
    if svd.svd != "krylov":
        return svd
    passes = _fast_passes(r)
    return svd._replace(passes=passes if svd.passes is None else min(svd.passes, passes))


@dataclass
class _Alternation:
    """The current state of a weight's alternations."""

    task: _Task
    taken: tuple[Tensor, Tensor]
    """The factors that the next residual lacks."""
    room: Tensor
    """Memory for the error of a residual."""
    error: float = math.inf
    """‖W - Q - L‖ of the last iterate."""
    best: Split | None = None
    least: float = math.inf
    """The error of the best iterate."""
    svd: SvdOptions | None = None
    """The options with which the factors of the best iterate were found."""


def _alternated(tasks: Sequence[_Task], how: _How) -> list[Split]:
    """Returns the best iterate of each weight, for one or more weights.

    Raises:
        ValueError: the mean of scales overflows.
    """
    if how.quantise_first:
        taken = [empty_factors(task.weight) for task in tasks]
    else:
        fast = [_fast(how.svd, task.r) for task in tasks]
        first = _factors(tasks, [task.weight for task in tasks], [task.largest for task in tasks], fast)
        taken = [(a0, b0) for a0, b0, _ in first]
    every = [
        _Alternation(task, pair, task.weight.new_empty(task.weight.shape))
        for task, pair in zip(tasks, taken, strict=True)
    ]
    active = every
    for t in range(1, how.quant_iters + 1):
        svds = [how.svd if t == how.quant_iters else _fast(how.svd, one.task.r) for one in active]
        going_on = []
        for one, svd, (found, error) in zip(active, svds, _iterates(active, how.form, svds), strict=True):
            if one.best is None or error < one.least:
                one.best, one.least, one.svd = found, error, svd
            gain = 1 - error / one.error if one.error > 0 else 0.0
            if gain >= how.tolerance or how.tolerance == 0:
                going_on.append(one)
            one.taken, one.error = (found.a0, found.b0), error
        active = going_on
        if not active:
            break
    again = [one for one in every if one.svd != how.svd]
    if again:
        for one in again:
            if one.best is not None and one.best.taken is not None:
                one.taken = one.best.taken
        for one, (found, _) in zip(again, _iterates(again, how.form, [how.svd] * len(again)), strict=True):
            one.best = found
    return [one.best for one in every if one.best is not None]


def _iterates(some: Sequence[_Alternation], form: str, svds: Sequence[SvdOptions]) -> list[tuple[Split, float]]:
    """Returns the iterates whose residuals lack the taken factors, and their errors. The host waits for a GPU twice, in
    addition to the decompositions, which wait once for each shape of weights."""
    tasks, rooms, residuals, squares = [one.task for one in some], [one.room for one in some], [], []
    for one in some:
        rest = _residual(one.task, one.taken, form)
        assert isinstance(rest, QuantizedWeight)  # `check_alternation` refuses other forms
        residuals.append(rest)
        error = _OPS.quantization_error(one.task.weight, *rest[:5], rest.blocksize, one.room)
        squares.append(error if one.task.moment is None else _square(one.room, one.task.moment))
    largest, offsets = torch.stack([_OPS.max_abs(rooms), offsets_of(residuals)]).tolist()
    for task, bound, offset in zip(tasks, largest, offsets, strict=True):
        check_offset(offset, task.name)
        check_finite(bound, task.name)
    factors = _factors(tasks, rooms, largest, svds)
    found = [Split(a0, b0, rest, one.taken) for (a0, b0, _), rest, one in zip(factors, residuals, some, strict=True)]
    # By Pythagoras, the projection L of an error E leaves ‖E‖² - ‖L‖², up to about 2^-22 of ‖E‖².
    kept = torch.stack([_square_of_factors(task, found) for task, found in zip(tasks, factors, strict=True)])
    norms = (torch.stack(squares) - kept).clamp_min(0).sqrt().tolist()
    return list(zip(found, norms, strict=True))


def _square(matrix: Tensor, moment: Tensor) -> Tensor:
    """float64: tr(M R Mᵀ), the square of a matrix's contribution to the outputs."""
    values = matrix.float()
    return (values @ moment * values).sum(dtype=torch.float64)


def _square_of_factors(task: _Task, found: Factors) -> Tensor:
    """The same for the factors' product, in the norm in which they were found."""
    if task.moment is None:
        return found.s.double().square().sum()
    inner = (found.a0 @ task.moment).double() @ found.a0.double().mT
    b0 = found.b0.double()
    return task.scaling**2 * (b0 @ inner * b0).sum()


def _factors(
    tasks: Sequence[_Task], matrices: Sequence[Tensor], largest: Sequence[float], svds: Sequence[SvdOptions]
) -> list[Factors]:
    """The factors of matrices that replace the tasks' weights. Those with the same options are decomposed together."""
    found: dict[int, Factors] = {}
    for svd in dict.fromkeys(svds):
        group = [i for i, other in enumerate(svds) if other == svd]
        ranks, scalings = [tasks[i].r for i in group], [tasks[i].scaling for i in group]
        moments = [moment for i in group if (moment := tasks[i].moment) is not None]
        some = unchecked_factors(
            [matrices[i] for i in group], [largest[i] for i in group], ranks, scalings, svd, moments or None
        )
        found |= zip(group, some, strict=True)
    return [found[i] for i in range(len(tasks))]
