"""Figure 8: adapters made of the principal, the medium and the minor components."""

from __future__ import annotations

from bench.experiments import figures, grid, measures, tables
from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.sweep import Sweep

METHODS = {"pissa": "principal", "medium": "medium", "minor": "minor"}


def sweeps(options: Options) -> dict[str, Sweep]:
    return {method: grid.sized(grid.encoder_sweep("films", method), options) for method in METHODS}


class Components(Experiment):
    name = "components"
    title = "Principal, medium and minor components"
    claim = (
        "figure 8: the principal components reach the least loss and the best accuracy, then the medium, then the minor"
    )

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        return grid.wanted(sweeps(options).values(), known, options)

    def section(self, known: Known, options: Options) -> Section:
        each = sweeps(options)
        losses = {method: measures.over_seeds(sweep, known) for method, sweep in each.items()}
        accuracies = {method: measures.over_seeds(sweep, known, measures.accuracy) for method, sweep in each.items()}
        texts = tables.column(losses), tables.column(accuracies, 1, largest=True)
        rows = [
            [
                METHODS[method],
                tables.rate(sweep.best(known)),
                *(column[method] for column in texts),
                tables.count(losses[method]),
            ]
            for method, sweep in each.items()
        ]
        text = [
            tables.table([f"{measures.TASKS['films']}, rank 16", "best rate", "loss", "accuracy, %", "seeds"], rows),
            measures.verdict({METHODS[method]: loss for method, loss in losses.items()}),
        ]
        figure, (axes,) = figures.panels([f"{measures.TASKS['films']}, rank 16"], height=2.2)
        figures.sweeps(axes, each, known)
        figures.legend(figure, tuple(METHODS), figures.SWEEP_NOTE)
        return Section("\n\n".join(text), {"components.png": figure})
