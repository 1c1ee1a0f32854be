"""The rate that `--lr auto` suggests, against the sweeps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from statistics import median

from bench.experiments import grid, measures, tables
from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.figures import label
from bench.experiments.suggestion import SuggestionCell
from bench.experiments.sweep import Sweep
from bench.suggest_lr import __main__ as suggest_lr
from bench.training.results import Results

METHODS = {"gsm8k": ("pissa", "lora", "unit", "qpissa_1"), "sums": ("pissa", "lora", "unit")}
GROUPS = tuple((task, method) for task, methods in METHODS.items() for method in methods)


def sweep_of(task: str, method: str, options: Options) -> Sweep:
    return grid.sized(grid.language_sweep(task, method), options)


class Suggested(Experiment):
    name = "suggested"
    title = "The rate that `--lr auto` suggests"
    claim = "nothing of this; it takes one rate for all methods. Ours comes from trainings in miniature"

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        suggestions = [SuggestionCell(task, method, 16) for task, method in GROUPS]
        return [*suggestions, *grid.wanted([sweep_of(*group, options) for group in GROUPS], known, options)]

    def section(self, known: Known, options: Options) -> Section:
        head = ["rank 16", "suggested", "best of the sweep", "loss at the suggested rate over the best", "seconds"]
        rows = [_row(task, method, sweep_of(task, method, options), known) for task, method in GROUPS]
        text = [
            "Loss at the suggested rate: interpolated in the sweep, over the rate's logarithm; n = 1 seed.",
            tables.table(head, rows),
            _other_cells(),
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


def _other_cells() -> str:
    """What bench/suggest_lr has measured, at the suggested rates themselves."""
    results = Results(suggest_lr.RESULTS, suggest_lr.Cell)
    ratios = [ratio for _, ratio in suggest_lr.best_of_sweeps(results).values()]
    return (
        f"`python -m bench.suggest_lr` has trained at the suggested rates, beside {len(ratios)} sweeps of seven "
        f"rates (PiSSA and LoRA, ranks 4, 16 and 64, two tasks). The loss there over the best of the sweep: median "
        f"{tables.number(median(ratios), 3)}, from {tables.number(min(ratios), 3)} to {tables.number(max(ratios), 3)}."
    )
