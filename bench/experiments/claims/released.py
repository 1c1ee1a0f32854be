"""The cost of training on the formats of released models, compared with NF4 and 16 bits."""

from __future__ import annotations

from dataclasses import replace

from bench.experiments import grid, measures, tables
from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.figures import label
from bench.experiments.methods import RELEASED
from bench.experiments.sweep import Sweep

KNOWN = ("lora", "qlora")
"""Whose sweeps `methods` has."""


def sweeps(options: Options) -> dict[str, Sweep]:
    """Those of the formats are of one rate, the best of LoRA's and QLoRA's."""
    each = {method: grid.language_sweep("gsm8k", method) for method in (*KNOWN, *RELEASED)}
    one = {method: replace(each[method], points=1, extends=False) for method in RELEASED}
    return {method: grid.sized(sweep, options) for method, sweep in (each | one).items()}


class Released(Experiment):
    name = "released"
    title = "The formats of released models"
    claim = "nothing of this; models that come in few bits only are trained as they are"

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        return grid.wanted(sweeps(options).values(), known, options)

    def section(self, known: Known, options: Options) -> Section:
        each = sweeps(options)
        losses = {method: measures.over_seeds(sweep, known) for method, sweep in each.items()}
        rows = []
        for method, sweep in each.items():
            before = next((result["before"]["loss"] for result in measures.above_0(sweep, known).values()), None)
            gaps = ["" if method == other else tables.difference(losses[method], losses[other]) for other in KNOWN]
            rate = tables.rate(sweep.best(known))
            rows.append([label(method), tables.number(before), tables.measured(losses[method]), *gaps, rate])
        text = (
            f"{measures.TASKS['gsm8k']}, rank 16, LoRA's start on the weight quantised to each format, as its library "
            "does it (int4 in groups of 64, fp8 with a scale for each row): held-out loss before and after training."
        )
        head = ["base", "before", "after", "less dense LoRA's", "less QLoRA's", "rate"]
        return Section(f"{text}\n\n{tables.table(head, rows)}", {})
