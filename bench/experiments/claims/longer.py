"""Six times as many steps: whether the order of short trainings holds."""

from __future__ import annotations

from dataclasses import replace

from bench.experiments import grid, measures, tables
from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.figures import label
from bench.experiments.language import LanguageCell
from bench.experiments.sweep import SEEDS, Sweep, loss_of

TASK = "gsm8k_250"
METHODS = ("lora", "rslora", "pissa")


def sweeps(options: Options) -> dict[str, Sweep]:
    """The short ones."""
    return {method: grid.sized(grid.language_sweep("gsm8k", method), options) for method in METHODS}


def cells(sweep: Sweep, known: Known) -> list[LanguageCell]:
    """At the best rate of the short trainings and at a third of it; then with further seeds at the better one."""
    if (best := sweep.best(known)) is None:
        return []
    first = [replace(sweep.cell, task=TASK, rate=rate) for rate in (best, float(f"{best / 3:.2g}"))]
    if any(cell not in known for cell in first):
        return first
    better = min(first, key=lambda cell: loss_of(known[cell]))
    return [*first, *(replace(better, seed=seed) for seed in SEEDS)]


class Longer(Experiment):
    name = "longer"
    title = "Longer trainings"
    claim = "table 2: PiSSA is above LoRA, after 781 steps of 128"

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        each = sweeps(options)
        rest = [cell for sweep in each.values() for cell in cells(sweep, known)]
        return [*grid.wanted(each.values(), known, options), *sorted(rest, key=lambda cell: cell.seed)]

    def section(self, known: Known, options: Options) -> Section:
        each = sweeps(options)
        found = {method: [cell for cell in cells(sweep, known) if cell in known] for method, sweep in each.items()}
        lines = {m: {cell.rate: loss_of(known[cell]) for cell in some if cell.seed == 0} for m, some in found.items()}
        best = {method: min(line, key=lambda rate: line[rate], default=None) for method, line in lines.items()}
        losses = {
            method: measures.mean_of((known[cell] for cell in some if cell.rate == best[method]), loss_of)
            for method, some in found.items()
        }
        short = {method: measures.over_seeds(sweep, known) for method, sweep in each.items()}
        rows = [
            [
                label(method),
                "; ".join(f"{tables.number(loss)} at {tables.rate(rate)}" for rate, loss in lines[method].items()),
                tables.measured(losses[method]),
                *("" if method == "lora" else tables.difference(of[method], of["lora"]) for of in (losses, short)),
                tables.count(losses[method]),
            ]
            for method in METHODS
        ]
        head = ["method", "seed 0", "at the better rate", "less LoRA's", "less LoRA's after 40 steps", "seeds"]
        text = [
            "SmolLM2 on 500 problems of GSM8K in 250 steps, rank 16, dense base: held-out loss at the best rate of 40 "
            "steps and at a third of it.",
            tables.table(head, rows),
        ]
        return Section("\n\n".join(text))
