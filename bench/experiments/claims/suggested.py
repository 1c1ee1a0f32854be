"""The rate that `--lr auto` suggests, compared with the sweeps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

from bench.experiments import grid, measures, tables
from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.figures import label
from bench.experiments.language import LanguageCell
from bench.experiments.suggestion import SuggestionCell
from bench.experiments.sweep import Sweep, loss_of

METHODS = {"gsm8k": ("pissa", "lora", "unit", "qpissa_1"), "sums": ("pissa", "lora", "unit")}
GROUPS = tuple((task, method) for task, methods in METHODS.items() for method in methods)
TRIALS = {
    ("pissa", 4): 1e-3,
    ("pissa", 16): 5e-4,
    ("pissa", 64): 2e-4,
    ("lora", 4): 2e-3,
    ("lora", 16): 2e-3,
    ("lora", 64): 1e-3,
}
"""The middles of sweeps of seven rates, on tasks that are not those above."""
TRIAL_GROUPS = tuple((task, *group) for task in ("gsm8k_24", "sentences") for group in TRIALS)


def sweep_of(task: str, method: str, options: Options) -> Sweep:
    return grid.sized(grid.language_sweep(task, method), options)


def trial_sweep(task: str, method: str, r: int, options: Options) -> Sweep:
    sweep = Sweep(LanguageCell(task, method, r, TRIALS[method, r]), seeds=(), points=7, extends=False)
    return grid.sized(sweep, options)


class Suggested(Experiment):
    name = "suggested"
    title = "The rate that `--lr auto` suggests"
    claim = "nothing of this; it takes one rate for all methods. Ours comes from trainings in miniature"

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        suggestions = [SuggestionCell(task, method, 16) for task, method in GROUPS]
        groups = TRIAL_GROUPS[::6] if options.quick else TRIAL_GROUPS
        trials = [SuggestionCell(*group) for group in groups]
        trained = [at_suggested(trial, known) for trial in trials if trial in known]
        sweeps = [sweep_of(*group, options) for group in GROUPS] + [trial_sweep(*group, options) for group in groups]
        return [*suggestions, *trials, *trained, *grid.wanted(sweeps, known, options)]

    def section(self, known: Known, options: Options) -> Section:
        head = ["rank 16", "suggested", "best of the sweep", "loss at the suggested rate over the best", "seconds"]
        trials = [_trial_row(*group, known, options) for group in TRIAL_GROUPS]
        rows = [_row(task, method, sweep_of(task, method, options), known) for task, method in GROUPS]
        text = [
            "Loss at the suggested rate: interpolated in the sweep, over the rate's logarithm; n = 1 seed.",
            tables.table(head, rows),
            "Trained at the suggested rate itself, beside sweeps of seven rates: loss of each, n = 1 seed.",
            tables.table(["task, method, rank", "best of the sweep", "suggested", "ratio"], trials),
        ]
        return Section("\n\n".join(text))


def interpolated(losses: Mapping[float, float], rate: float) -> float | None:
    """The loss at a rate between two of a sweep, linear over the rate's logarithm; None beyond the ends."""
    for low, high in pairwise(sorted(losses)):
        if low <= rate <= high:
            share = math.log(rate / low) / math.log(high / low)
            return losses[low] + share * (losses[high] - losses[low])
    return None


def _row(task: str, method: str, sweep: Sweep, known: Known) -> list[str]:
    cell, best = SuggestionCell(task, method, 16), sweep.best(known)
    name = f"{measures.TASKS[task]}, {label(method)}"
    if cell not in known:
        return [name, tables.MISSING, tables.rate(best), tables.MISSING, tables.MISSING]
    found, losses = known[cell], sweep.losses(known)
    ratio = tables.MISSING
    if best is not None:
        loss = interpolated(losses, found["rate"])
        ratio = "beyond the sweep" if loss is None else tables.number(loss / losses[best], 3)
    return [name, tables.rate(found["rate"]), tables.rate(best), ratio, tables.number(found["seconds"], 0)]


def _trial_row(task: str, method: str, r: int, known: Known, options: Options) -> list[str]:
    """The row of the suggested rate itself, which was trained too."""
    suggestion, sweep = SuggestionCell(task, method, r), trial_sweep(task, method, r, options)
    name, best = f"{measures.NAMES[task]}, {label(method)}, {r}", sweep.best(known)
    if best is None or suggestion not in known or (cell := at_suggested(suggestion, known)) not in known:
        return [name, *[tables.MISSING] * 3]
    least, loss = sweep.losses(known)[best], loss_of(known[cell])
    found = [f"{tables.number(one, 3)} at {tables.rate(rate)}" for one, rate in ((least, best), (loss, cell.rate))]
    return [name, *found, tables.number(loss / least, 3)]


def at_suggested(suggestion: SuggestionCell, known: Known) -> LanguageCell:
    return LanguageCell(suggestion.task, suggestion.method, suggestion.r, known[suggestion]["rate"])
