"""Figures 7, 15 to 17: ranks from 1 to 128."""

from __future__ import annotations

from bench.experiments import figures, grid, measures, tables
from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.figures import label
from bench.experiments.sweep import Spread, Sweep

RANKS = (1, 4, 16, 64, 128)
METHODS = ("lora", "pissa")


def sweeps(method: str, options: Options) -> dict[int, Sweep]:
    return {r: grid.sized(grid.encoder_sweep("films", method, r, seeds=()), options) for r in RANKS}


class Ranks(Experiment):
    name = "ranks"
    title = "Ranks from 1 to 128"
    claim = "figures 7 and 15 to 17: PiSSA is above LoRA at every rank, the more the smaller it is"

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        return grid.wanted([sweep for method in METHODS for sweep in sweeps(method, options).values()], known, options)

    def section(self, known: Known, options: Options) -> Section:
        each = {method: sweeps(method, options) for method in METHODS}
        losses = {m: {r: measures.over_seeds(sweep, known) for r, sweep in of_m.items()} for m, of_m in each.items()}
        lora, pissa = losses.values()
        rows = [
            [
                str(r),
                *(
                    text
                    for m in METHODS
                    for text in (tables.measured(losses[m][r]), tables.rate(each[m][r].best(known)))
                ),
                tables.difference(pissa[r], lora[r]),
            ]
            for r in RANKS
        ]
        head = ["rank", *(text for method in METHODS for text in (label(method), "best rate")), "PiSSA less LoRA"]
        pairs = [(one, other) for r in RANKS if (one := pissa[r]) is not None and (other := lora[r]) is not None]
        better = sum(one.mean < other.mean for one, other in pairs)
        text = [
            f"{measures.TASKS['films']}: loss at the best rate, one seed only: differences may be chance.",
            tables.table(head, rows),
            f"PiSSA is below LoRA at {better} of {len(pairs)} ranks. `quant-errors` has the error of 4 bits by rank.",
        ]
        return Section("\n\n".join(text), {"ranks.png": _picture(losses)})


def _picture(losses: dict[str, dict[int, Spread | None]]) -> figures.Figure:
    figure, (axes,) = figures.panels([measures.TASKS["films"]], height=2.4)
    known = {m: {r: loss for r, loss in of_m.items() if loss is not None} for m, of_m in losses.items()}
    figures.lines(axes, known)
    figures.doubling(axes, RANKS)
    axes.set_ylabel("held-out loss (nats)")
    figures.legend(figure, METHODS, "n = 1 seed; each at its best rate")
    return figure
