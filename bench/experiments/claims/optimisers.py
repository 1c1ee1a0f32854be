"""Whether PiSSA is ahead with an optimiser that does not see how long the factors are."""

from __future__ import annotations

from bench.experiments import figures, grid, measures, tables
from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.figures import label
from bench.experiments.sweep import Sweep

METHODS = ("lora", "pissa", "lora_muon", "pissa_muon", "lora_product", "pissa_product")


def sweeps(options: Options) -> dict[str, Sweep]:
    return {method: grid.sized(grid.language_sweep("gsm8k", method), options) for method in METHODS}


class Optimisers(Experiment):
    name = "optimisers"
    title = "Optimisers that do not see how long the factors are"
    claim = "nothing of this: all methods are trained by AdamW, to which PiSSA's factors are long and LoRA's B is 0"

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        return grid.wanted(sweeps(options).values(), known, options)

    def section(self, known: Known, options: Options) -> Section:
        each = sweeps(options)
        losses = {method: measures.over_seeds(sweep, known) for method, sweep in each.items()}
        rows = []
        for one, other in zip(METHODS[::2], METHODS[1::2], strict=True):
            rates = [tables.rate(each[method].best(known)) for method in (one, other)]
            optimiser = label(one).partition(", ")[2] or "AdamW"
            losses_of = [tables.measured(losses[method]) for method in (one, other)]
            rows.append([optimiser, *losses_of, *rates, tables.difference(losses[other], losses[one])])
        text = [
            f"{measures.TASKS['gsm8k']}, rank 16, dense base: held-out loss at the best rate; PiSSA less LoRA ± two "
            "standard errors. Muon has momentum 0.9 and steps as large as AdamW's; on B A it orthogonalises the "
            "gradient of the product, projected to the matrices of rank r (Riemannion, arXiv 2507.12142).",
            tables.table(["optimiser", "LoRA", "PiSSA", "LoRA's rate", "PiSSA's rate", "PiSSA less LoRA"], rows),
        ]
        figure, axes = figures.panels([label(name).partition(", ")[2] or "AdamW" for name in METHODS[::2]])
        for one, pair in zip(axes, zip(METHODS[::2], METHODS[1::2], strict=True), strict=True):
            figures.sweeps(one, {method: each[method] for method in pair}, known)
        figures.legend(figure, METHODS, figures.SWEEP_NOTE, columns=3)
        return Section("\n\n".join(text), {"optimisers.png": figure})
