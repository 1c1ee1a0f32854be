"""Six times as many steps: whether the order of short trainings holds."""

from __future__ import annotations

from dataclasses import replace

from bench.experiments import grid, measures, tables
from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.figures import label
from bench.experiments.language import LanguageCell
from bench.experiments.sweep import SEEDS, loss_of

METHODS = ("lora", "pissa", "rslora")


def cells(method: str, known: Known, options: Options) -> list[LanguageCell]:
    """At the best rate of the short trainings and at a third of it, then with further seeds at the better one."""
    sweep = grid.sized(grid.language_sweep("gsm8k", method), options)
    if (best := sweep.best(known)) is None:
        return []
    first = [replace(sweep.cell, task="gsm8k_250", rate=rate) for rate in (best, float(f"{best / 3:.2g}"))]
    if any(cell not in known for cell in first):
        return first
    better = min(first, key=lambda cell: loss_of(known[cell]))
    return [*first, *(replace(better, seed=seed) for seed in SEEDS)]


class Longer(Experiment):
    name = "longer"
    title = "Longer trainings"
    claim = "table 2: PiSSA is above LoRA after 781 steps of 128"

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        each = [cells(method, known, options) for method in METHODS]
        return [cell for number in (slice(0, 2), slice(2, 4)) for some in each for cell in some[number]]

    def section(self, known: Known, options: Options) -> Section:
        return Section("")
