"""The values that tables and pictures take from the results of a sweep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from statistics import median

from bench.experiments import tables
from bench.experiments.experiment import Known, Result
from bench.experiments.figures import label
from bench.experiments.sweep import Spread, Sweep, loss_of, spread

NAMES = {
    **{"gsm8k": "GSM8K", "gsm8k_250": "GSM8K, 250 steps", "gsm8k_24": "GSM8K, 24 steps"},
    **{name: name for name in ("sums", "sentences", "films", "products")},
}
ENCODED = ("films", "products")
TASKS = {task: f"{'MiniLM' if task in ENCODED else 'SmolLM2'} on {name}" for task, name in NAMES.items()}
"""Titles."""


def mean_of(results: Iterable[Result], measure: Callable[[Result], float]) -> Spread | None:
    """The mean over seeds. Infinite if it is infinite for one of them, None without results."""
    return spread(values) if (values := [measure(result) for result in results]) else None


def over_seeds(sweep: Sweep, known: Known, measure: Callable[[Result], float] = loss_of) -> Spread | None:
    """A measure at the best rate, over seeds. None while that rate is not known."""
    return mean_of(sweep.at_best(known), measure)


def accuracy(result: Result) -> float:
    """The accuracy in percent."""
    return 100 * float(result["after"]["accuracy"])


def seed_0(sweep: Sweep, known: Known) -> Result | None:
    """The sweep's own result at the best rate. Its time contains only training."""
    best = sweep.best(known)
    return None if best is None else known[sweep.at(best)]


def above_0(sweep: Sweep, known: Known) -> dict[int, Result]:
    """The results of seeds above 0 at the best rate: a language model's have a curve, and losses before training."""
    best = sweep.best(known)
    cells = {} if best is None else {seed: sweep.at(best, seed) for seed in sweep.seeds}
    return {seed: known[cell] for seed, cell in cells.items() if cell in known}


def curve(result: Result) -> list[tuple[float, float]]:
    """(step, held-out loss) from before the first step to the last; infinite, None in the files, where training
    diverged."""
    between = [(step, loss) for step, loss in result["curve"] if step < result["steps"]]
    points = [(0, result["before"]["loss"]), *between, (result["steps"], result["after"]["loss"])]
    return [(float(step), math.inf if loss is None else float(loss)) for step, loss in points]


def first_and_last(norms: list[float | None], count: int = 10) -> tuple[float, float]:
    """The medians of the first and of the last gradient norms."""
    known = [norm for norm in norms if norm is not None]
    return median(known[:count]), median(known[-count:])


def verdict(spreads: Mapping[str, Spread | None], what: str = "loss", largest: bool = False) -> str:
    """One sentence: the method that is better than all others, or how many are not distinguishable from the first."""
    found = {name: one for name, one in spreads.items() if one is not None}
    if len(found) < 2:
        return "Not enough is known to compare."
    ordered = sorted(found, key=lambda name: found[name].mean, reverse=largest)
    first = f"{'Highest' if largest else 'Lowest'} {what}: {label(ordered[0])}"
    if tables.winner(found, largest):
        return f"{first}, apart from each other method by more than two standard errors of the difference."
    alike = [label(name) for name in ordered[1:] if not tables.differ(found[ordered[0]], found[name])]
    return f"{first}; not distinguishable from it: {'; '.join(alike)}."
