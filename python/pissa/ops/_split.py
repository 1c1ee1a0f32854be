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
    quant_options,
    unchecked_factors,
    unchecked_residual,
)
from pissa.ops._quant import QuantizedWeight, check_feedback, check_offset, offsets_of
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
weights have nothing left to gain by then (bench/results/quant_iters.json)."""


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
    """Computes PiSSA's start factors of weights and, on request, their residuals (arXiv 2404.02948, eq. 2-4 and 8).
    Each result is, bit for bit, that of its weight alone. Small weights are split side by side, on one thread each.

    Args:
        weights: [out, in] each, float32, bfloat16 or float16, finite; of any shapes, on one device. For each weight,
            alternations need memory for an error as large as the weight, and twice for its codes.
        ranks: r of each weight, 1 to min(out, in).
        scalings: the scale s of each weight's adapter, `lora_alpha / r`; the factors are √(S/s) Vᵀ and U √(S/s).
        svd, passes, seed: see `svd_lowrank`. "auto" makes as many passes as each rank needs.
        form: form of the residuals: "implicit" (none is computed), "explicit" (W - s B0 A0 in the weight's dtype), or
            one of `formats.FORMATS` (the same, quantised without being stored).
        blocksize, double_quant: for a quantised format; see `quantize`.
        quant_iters: T for a quantised format. With 1, the residual is Q = format(W - L) for the factors of W, L = s B0
            A0 (QPiSSA, section 4). With more, the steps Q = format(W - L), then L = the best approximation of W - Q,
            are repeated T times (Algorithm 1). This starts from the factors of W and costs T + 1 decompositions, all
            but the last with at most 8 passes. The result is the iterate with the least ‖W - Q - L‖.
        quantise_first: start these alternations from L = 0, with T decompositions: LoftQ (arXiv 2310.08659).
        tolerance: a weight's alternations end when one reduces ‖W - Q - L‖ by less than this share of it; 0: never.
        names: names of the weights in errors (default: "weights[0]", "weights[1]", ...).
        second_moments: E[xᵀx] of each layer's inputs x, float32 [in, in], on the weights' device, symmetric and
            positive semi-definite, of any rank and scale. The product of the factors then loses least of the outputs
            (QERA, arXiv 2410.06040), and alternations are compared by the outputs. A moment is read half as often as
            its weight, plus once. Weights that share one tensor share its factorisation.
        error_feedback: with second moments, find the codes of a quantised form by error feedback
            (`ops._second_moment`), which loses less of the outputs. The scales stay those of the residual. A row must
            end with a whole byte.

    Returns:
        The factors and the residual of each weight, in their order, on the weights' device; see `Split` for shapes and
        dtypes.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, before anything is decomposed. Afterwards:
            the mean of a weight's scales overflows. The weights are never changed.
    """
    names = [f"weights[{i}]" for i in range(len(weights))] if names is None else names
    lists = {"ranks": ranks, "scalings": scalings, "names": names, "second_moments": second_moments}
    check_lengths(lists, len(weights))
    svd_options = SvdOptions(svd, check_svd(svd, passes, seed), seed)
    check_alternation(quant_iters, quantise_first, tolerance, form)
    weights, largest = check_weights(weights, names)
    moments: Sequence[Tensor | None] = [None] * len(weights)
    feedback = moments
    if error_feedback:
        check_feedback(form, weights, names)
        if second_moments is None:
            raise ValueError("error_feedback: got True without second_moments, by which it weighs errors; give both")
    if second_moments is not None:
        moments = checked = check_moments(second_moments, weights, names)
        feedback = feedback_factors(checked) if error_feedback else feedback
    options = [quant_options(form, ("implicit", "explicit"), blocksize, double_quant, weight) for weight in weights]
    for name, weight, r, scaling in zip(names, weights, ranks, scalings, strict=True):
        check_rank(r, weight, f"r of {name}")
        check_scaling(scaling, f"scaling of {name}")
    tasks = list(map(_Task, weights, largest, ranks, scalings, options, names, moments, feedback))
    if not tasks:
        return []
    if quant_iters > 1 or quantise_first:
        return _alternate(tasks, form, svd_options, quant_iters, quantise_first, tolerance)
    factors = _factors(tasks, weights, largest, [svd_options] * len(tasks))
    if form == "implicit":
        return [Split(a0, b0, None) for a0, b0, _ in factors]
    rests = [_residual(task, (a0, b0), form) for task, (a0, b0, _) in zip(tasks, factors, strict=True)]
    if any(isinstance(rest, QuantizedWeight) and rest.nested for rest in rests):  # else no need to wait for a GPU
        for name, offset in zip(names, offsets_of(rests).tolist(), strict=True):
            check_offset(offset, name)
    return [Split(a0, b0, rest) for (a0, b0, _), rest in zip(factors, rests, strict=True)]


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


def _residual(task: _Task, taken: tuple[Tensor, Tensor], form: str) -> Tensor | QuantizedWeight:
    return unchecked_residual(task.weight, *taken, task.scaling, form, task.options, task.feedback)


# ---- Alternations ----------------------------------------------------------------------------------------------------


def _fast_passes(r: int) -> int:
    """The passes for factors that are only subtracted from the weight. With T = 5, nf4 then loses at most 0.6 points of
    the error removed, compared with all passes; with 6 at r = 128 it would lose 2.3
    (bench/results/quant_iters.json)."""
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


def _alternate(
    tasks: Sequence[_Task], form: str, all_passes: SvdOptions, quant_iters: int, quantise_first: bool, tolerance: float
) -> list[Split]:
    """Returns the best iterate of each weight, for one or more weights.

    Raises:
        ValueError: the mean of scales overflows.
    """
    if quantise_first:
        taken = [empty_factors(task.weight) for task in tasks]
    else:
        svds = [_fast(all_passes, task.r) for task in tasks]
        first = _factors(tasks, [task.weight for task in tasks], [task.largest for task in tasks], svds)
        taken = [(a0, b0) for a0, b0, _ in first]
    states = [
        _Alternation(task, pair, task.weight.new_empty(task.weight.shape))
        for task, pair in zip(tasks, taken, strict=True)
    ]
    active = states
    for t in range(1, quant_iters + 1):
        svds = [all_passes if t == quant_iters else _fast(all_passes, state.task.r) for state in active]
        continuing = []
        for state, svd, (iterate, error) in zip(active, svds, _iterate(active, form, svds), strict=True):
            if state.best is None or error < state.least:
                state.best, state.least, state.svd = iterate, error, svd
            gain = 1 - error / state.error if state.error > 0 else 0.0
            if gain >= tolerance or tolerance == 0:
                continuing.append(state)
            state.taken, state.error = (iterate.a0, iterate.b0), error
        active = continuing
        if not active:
            break
    fast = [state for state in states if state.svd != all_passes]
    for state in fast:
        if state.best is not None and state.best.taken is not None:
            state.taken = state.best.taken
    for state, (iterate, _) in zip(fast, _iterate(fast, form, [all_passes] * len(fast)), strict=True):
        state.best = iterate
    return [state.best for state in states if state.best is not None]


def _iterate(states: Sequence[_Alternation], form: str, svds: Sequence[SvdOptions]) -> list[tuple[Split, float]]:
    """Returns the iterates whose residuals lack the taken factors, and their errors. The host waits for a GPU twice, in
    addition to the decompositions, which wait once for each shape of weights."""
    if not states:
        return []
    tasks, rooms, residuals, squares = [state.task for state in states], [state.room for state in states], [], []
    for task, room, state in zip(tasks, rooms, states, strict=True):
        rest = _residual(task, state.taken, form)
        assert isinstance(rest, QuantizedWeight)  # `check_alternation` refuses other forms
        residuals.append(rest)
        error = _OPS.quantization_error(task.weight, *rest[:5], rest.blocksize, room)
        squares.append(error if task.moment is None else _square(room, task.moment))
    largest, offsets = torch.stack([_OPS.max_abs(rooms), offsets_of(residuals)]).tolist()
    for task, bound, offset in zip(tasks, largest, offsets, strict=True):
        check_offset(offset, task.name)
        check_finite(bound, task.name)
    factors = _factors(tasks, rooms, largest, svds)
    splits = [Split(f.a0, f.b0, rest, state.taken) for f, rest, state in zip(factors, residuals, states, strict=True)]
    # By Pythagoras, the projection L of an error E leaves ‖E‖² - ‖L‖², up to about 2^-22 of ‖E‖².
    kept = torch.stack(list(map(_square_of_factors, tasks, factors)))
    norms = (torch.stack(squares) - kept).clamp_min(0).sqrt().tolist()
    return list(zip(splits, norms, strict=True))


def _square(matrix: Tensor, moment: Tensor) -> Tensor:
    """float64: tr(M R Mᵀ), the square of a matrix's contribution to the outputs."""
    values = matrix.float()
    return (values @ moment * values).sum(dtype=torch.float64)


def _square_of_factors(task: _Task, factors: Factors) -> Tensor:
    """The same for the factors' product, in the norm in which they were computed."""
    if task.moment is None:
        return factors.s.double().square().sum()
    inner = (factors.a0 @ task.moment).double() @ factors.a0.double().mT
    b0 = factors.b0.double()
    return task.scaling**2 * (b0 @ inner * b0).sum()


def _factors(
    tasks: Sequence[_Task], matrices: Sequence[Tensor], largest: Sequence[float], svds: Sequence[SvdOptions]
) -> list[Factors]:
    """The factors of matrices that replace the tasks' weights. Those with the same options are decomposed together."""
    factors: dict[int, Factors] = {}
    for svd in dict.fromkeys(svds):
        group = [i for i, other in enumerate(svds) if other == svd]
        ranks, scalings = [tasks[i].r for i in group], [tasks[i].scaling for i in group]
        moments = [moment for i in group if (moment := tasks[i].moment) is not None]
        decomposed = unchecked_factors(
            [matrices[i] for i in group], [largest[i] for i in group], ranks, scalings, svd, moments or None
        )
        factors |= zip(group, decomposed, strict=True)
    return [factors[i] for i in range(len(tasks))]
