"""Sweeps of the learning rate: which rates are tried, which one is best, which seeds follow."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from statistics import mean, stdev
from typing import Any, NamedTuple

from bench.experiments.experiment import Known, Result

RATES = tuple(digit * 10.0**-power for power in range(6, 0, -1) for digit in (1, 2, 5))
"""1e-6, 2e-6, 5e-6, ..., 5e-1: factors of 2 and 2.5."""
POINTS = 5  # of a sweep at least
TOLERANCE = 0.02  # of a valley: a loss so near to the best one, by ratio, is in it
SEEDS = (1, 2)  # that follow at the best rate; 0 is the sweep's


class Spread(NamedTuple):
    """The measurements with several seeds."""

    values: tuple[float, ...]
    """In the order of the seeds: those of two methods are of the same seeds, as far as both go."""

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def deviation(self) -> float:
        """The standard deviation over the seeds (n - 1). NaN for one seed, and if one of them diverged."""
        return stdev(self.values) if self.n > 1 and math.isfinite(self.mean) else math.nan

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return self.deviation / math.sqrt(self.n)

    def less(self, other: Spread) -> Spread:
        """The differences, seed by seed. A seed draws the order of the data, the same for all methods: what that
        changes is not in them."""
        return Spread(tuple(one - two for one, two in zip(self.values, other.values, strict=False)))


def spread(values: Iterable[float]) -> Spread:
    return Spread(tuple(values))


def nearest(rate: float) -> float:
    """The nearest rate of the grid, by ratio."""
    return min(RATES, key=lambda known: abs(math.log(known / rate)))


@dataclass(frozen=True)
class Sweep:
    """One method on one task: `cell` with the rates of the grid, and with further seeds at the best of them."""

    cell: Any
    """Its rate is the middle of the sweep, in RATES; its seed is the one that chooses the best rate, mostly 0."""
    seeds: tuple[int, ...] = SEEDS
    points: int = POINTS
    extends: bool = True
    """Whether the sweep goes on beyond an end that is the best."""

    def at(self, rate: float, seed: int | None = None) -> Any:
        return replace(self.cell, rate=rate, seed=self.cell.seed if seed is None else seed)

    def losses(self, known: Known) -> dict[float, float]:
        """The held-out losses of the first seed by rate, ascending; infinite where training diverged."""
        return {rate: loss_of(known[self.at(rate)]) for rate in RATES if self.at(rate) in known}

    def wanted(self, known: Known) -> list[Any]:
        """The rates of the sweep from the middle outwards; one further rate where the end is the best; then the
        seeds."""
        middle = RATES.index(nearest(self.cell.rate))
        half = self.points // 2
        first = [middle, *(middle + sign * step for step in range(1, half + 1) for sign in (-1, 1))]
        cells = [self.at(RATES[i]) for i in first]
        losses = self.losses(known)
        if any(cell not in known for cell in cells):
            return cells
        best = min(losses, key=lambda rate: losses[rate])
        index = RATES.index(best)
        for neighbour in (index - 1, index + 1):
            if self.extends and RATES[neighbour] not in losses:
                return [*map(self.at, losses), self.at(RATES[neighbour])]
        return [*map(self.at, losses), *(self.at(best, seed) for seed in self.seeds)]

    def best(self, known: Known) -> float | None:
        """The rate of the least loss; None while the sweep is not complete, or its best is at an end."""
        wanted = [cell for cell in self.wanted(known) if cell.seed == self.cell.seed]
        if any(cell not in known for cell in wanted):
            return None
        losses = self.losses(known)
        return min(losses, key=lambda rate: losses[rate])

    def at_best(self, known: Known) -> list[Result]:
        """The results of the seeds at the best rate, up to the first that is not known yet."""
        best = self.best(known)
        cells = [] if best is None else [self.at(best, seed) for seed in (self.cell.seed, *self.seeds)]
        return [known[cell] for cell in takewhile(known.__contains__, cells)]

    def width(self, known: Known) -> float | None:
        """The width of the valley in decades: how far the rates with a loss within 2% of the best lie apart. Between
        points the loss is interpolated over the rate's logarithm."""
        best = self.best(known)
        if best is None:
            return None
        losses = self.losses(known)
        allowed = losses[best] * (1 + TOLERANCE)
        rates = list(losses)
        index = rates.index(best)
        return _crossing(rates[index:], losses, allowed) - _crossing(rates[index::-1], losses, allowed)

    def bounded(self, known: Known) -> bool:
        """Whether the valley ends within the sweep on both sides; else its width is at least what is found."""
        losses = list(self.losses(known).values())
        return min(losses[0], losses[-1]) > min(losses) * (1 + TOLERANCE)


def loss_of(result: Result) -> float:
    """The held-out loss after training; infinite, None in the files, where training diverged."""
    loss = result["after"]["loss"]
    return math.inf if loss is None else float(loss)


def _crossing(rates: list[float], losses: dict[float, float], allowed: float) -> float:
    """log10 of the rate at which the loss first exceeds what is allowed, going along `rates`; of the last one if it
    never does."""
    for near, far in pairwise(rates):
        if losses[far] > allowed:
            share = (allowed - losses[near]) / (losses[far] - losses[near])
            return math.log10(near) + share * math.log10(far / near)
    return math.log10(rates[-1])
