"""Alternations of decomposition and quantisation: QPiSSA with T > 1 (arXiv 2404.02948, Algorithm 1), and LoftQ.

    L_0 = the best rank-r approximation of W, or, where W is quantised first, 0
    Q_t = format(W - L_{t-1}),  L_t = the best rank-r approximation of the error W - Q_t,  for t = 1 to T

and the result is the iterate (Q_t, L_t) of the least ‖W - Q_t - L_t‖. An error has the dtype of its weight, so that it
is decomposed at the same rate. In half precision that rounds it, which costs nf4 less than 0.5 points of the error
removed; int8, whose errors are 16 times smaller, 5 points of a weight of 384 x 384 at r = 128, and less the smaller
r / size is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pissa.ops._quant import QuantizedWeight, check_offset, offsets_of
from pissa.ops._residual import unchecked_quantized_residual
from pissa.ops._svd import Factors, SvdOptions, unchecked_factors
from pissa.ops.checks import check_finite
from pissa.ops.formats import FORMATS

_OPS = torch.ops.pissa


def _fast_passes(r: int) -> int:
    """Of a decomposition whose factors are only there to be taken out. With T = 5 nf4 then loses at most 0.6 points of
    the error removed, against all passes; with 6 at r = 128 it would lose 2.3 (bench/compare/quant_iters.py)."""
    return 6 if r <= 64 else 8


class Task(NamedTuple):
    """A weight that is fit for it, and what its alternations have to know."""

    weight: Tensor
    largest: float
    """Its largest element."""
    r: int
    scaling: float
    name: str
    """What errors call it."""


class Alternation(NamedTuple):
    """How weights are alternated; `split` says what each field is."""

    svd: SvdOptions
    form: str
    blocksize: int | None
    double_quant: bool | None
    quant_iters: int
    quantise_first: bool
    tolerance: float


class Iterate(NamedTuple):
    """One of a weight."""

    factors: Factors
    residual: QuantizedWeight
    taken: tuple[Tensor, Tensor]
    """The factors of the iterate before, which the residual lacks."""
    error: float
    """‖W - Q - L‖."""
    svd: SvdOptions
    """By which the factors were found."""


def alternate(tasks: Sequence[Task], alternation: Alternation) -> list[Iterate]:
    """The best iterate of each weight, one weight or more.

    Raises:
        ValueError: the mean of scales overflows.
    """
    groups: dict[int, list[int]] = {}
    for i, task in enumerate(tasks):
        groups.setdefault(_fast_passes(task.r), []).append(i)
    found: dict[int, Iterate] = {}
    for passes, group in groups.items():
        found |= zip(group, _alternate([tasks[i] for i in group], alternation, passes), strict=True)
    return [found[i] for i in range(len(tasks))]


def _alternate(tasks: Sequence[Task], alternation: Alternation, fast_passes: int) -> list[Iterate]:
    """The same for weights whose fast decompositions have as many passes."""
    svd = alternation.svd
    fast = _fast(svd, fast_passes)
    taken = [_nothing(task.weight) for task in tasks] if alternation.quantise_first else _first_factors(tasks, fast)
    rooms = [task.weight.new_empty(task.weight.shape) for task in tasks]
    best: dict[int, Iterate] = {}
    errors = [math.inf] * len(tasks)  # of the last iterates
    active = list(range(len(tasks)))
    for t in range(1, alternation.quant_iters + 1):
        iterates = _iterates(
            [tasks[i] for i in active],
            [_residual(tasks[i], taken[i], alternation) for i in active],
            [taken[i] for i in active],
            [rooms[i] for i in active],
            svd if t == alternation.quant_iters else fast,
        )
        going_on = []
        for i, iterate in zip(active, iterates, strict=True):
            if i not in best or iterate.error < best[i].error:
                best[i] = iterate
            gain = 1 - iterate.error / errors[i] if errors[i] > 0 else 0.0
            if gain >= alternation.tolerance or alternation.tolerance == 0:
                going_on.append(i)
            taken[i], errors[i] = iterate.factors[:2], iterate.error
        active = going_on
        if not active:
            break
    again = [i for i, iterate in best.items() if iterate.svd != svd]
    if again:
        residuals = [best[i].residual for i in again]
        before = [best[i].taken for i in again]
        found = _iterates([tasks[i] for i in again], residuals, before, [rooms[i] for i in again], svd)
        best |= zip(again, found, strict=True)
    return [best[i] for i in range(len(tasks))]


def _fast(svd: SvdOptions, passes: int) -> SvdOptions:
    """The same with so many passes, if it has more."""
    if svd.svd != "krylov":
        return svd
    return svd._replace(passes=passes if svd.passes is None else min(svd.passes, passes))


def _nothing(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of rank 0."""
    out, cols = weight.shape
    return weight.new_empty((0, cols), dtype=torch.float32), weight.new_empty((out, 0), dtype=torch.float32)


def _first_factors(tasks: Sequence[Task], svd: SvdOptions) -> list[tuple[Tensor, Tensor]]:
    """Those of the weights themselves."""
    weights, largest, ranks, scalings, _ = map(list, zip(*tasks, strict=True))
    return [(a0, b0) for a0, b0, _ in unchecked_factors(weights, largest, ranks, scalings, svd)]


def _residual(task: Task, taken: tuple[Tensor, Tensor], how: Alternation) -> QuantizedWeight:
    options = FORMATS[how.form].options(how.blocksize, how.double_quant, task.weight.shape[1])
    return unchecked_quantized_residual(task.weight, *taken, task.scaling, how.form, options)


def _iterates(
    tasks: Sequence[Task],
    residuals: Sequence[QuantizedWeight],
    taken: Sequence[tuple[Tensor, Tensor]],
    errors: Sequence[Tensor],
    svd: SvdOptions,
) -> list[Iterate]:
    """The iterates with these residuals; `errors` are memory for what these lose of the weights. The host waits for a
    GPU twice, besides the decompositions, which wait once for each shape of weights."""
    squares = [
        _OPS.quantization_error(task.weight, *rest[:5], rest.blocksize, error)
        for task, rest, error in zip(tasks, residuals, errors, strict=True)
    ]
    largest, offsets = torch.stack([_OPS.max_abs(errors), offsets_of(residuals)]).tolist()
    for task, bound, offset in zip(tasks, largest, offsets, strict=True):
        check_offset(offset, task.name)
        check_finite(bound, task.name)
    factors = unchecked_factors(errors, largest, [task.r for task in tasks], [task.scaling for task in tasks], svd)
    # By Pythagoras: the projection L of an error E leaves ‖E‖² - ‖L‖², up to some 2^-22 of ‖E‖².
    kept = torch.stack([found.s.double().square().sum() for found in factors])
    norms = (torch.stack(squares) - kept).clamp_min(0).sqrt().tolist()
    parts = zip(factors, residuals, taken, norms, strict=True)
    return [Iterate(*four, svd) for four in parts]
