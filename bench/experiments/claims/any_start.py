"""Any start on any 4-bit base: the value of the base's smaller error, before training and after it."""

from __future__ import annotations

from collections.abc import Mapping

from bench.experiments import figures, grid, measures, tables
from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.sweep import Spread, Sweep

BASES = ("nf4(W)", "Q + B0 A0, T = 1", "Q + B0 A0, T = 5")
STARTS = {
    "LoRA": ("qlora", "lora_on_1", "lora_on_5"),
    "PiSSA": ("pissa_on_nf4", "qpissa_1", "qpissa_5"),
    "orthonormal": ("unit_on_nf4", "unit_on_1", "unit_on_5"),
}
ALL = (*(method for methods in STARTS.values() for method in methods), "loftq")


def sweeps(options: Options) -> dict[str, Sweep]:
    return {method: grid.sized(grid.language_sweep("gsm8k", method), options) for method in ALL}


class AnyStart(Experiment):
    name = "any-start"
    title = "Any start on any base in 4 bits"
    claim = (
        "section 4 and table 9: QPiSSA's smaller error of the base is why it is above QLoRA (LLaMA-3-8B, GSM8K: "
        "70.79 to 73.76 with an error of 265.8 for 324.8)"
    )

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        return grid.wanted(sweeps(options).values(), known, options)

    def section(self, known: Known, options: Options) -> Section:
        each = sweeps(options)
        losses = {method: measures.over_seeds(sweep, known) for method, sweep in each.items()}
        after = tables.column(losses)
        before = {method: _before(each[method], known) for method in ALL}
        on_bases = [
            next((before[m] for m in methods if before[m] is not None), None)
            for methods in zip(*STARTS.values(), strict=True)
        ]
        rows = [["before training", *map(tables.number, on_bases)]]
        for start, methods in STARTS.items():
            rows.append([f"{start} start", *(f"{after[m]} at {tables.rate(each[m].best(known))}" for m in methods)])
        loftq = f"{after['loftq']} at {tables.rate(each['loftq'].best(known))}"
        gains = [
            f"{start} {tables.difference(losses[methods[2]], losses[methods[0]])}" for start, methods in STARTS.items()
        ]
        text = [
            f"{measures.TASKS['gsm8k']}, rank 16: held-out loss of each start on each base.",
            tables.table(["", *BASES], rows),
            f"LoftQ, T = 5, on its own base: {tables.number(before['loftq'])} before training, {loftq} after it.",
            f"Loss after training on the base of T = 5 less that on nf4(W), ± two standard errors: {'; '.join(gains)}.",
            measures.verdict(losses),
        ]
        return Section("\n\n".join(text), {"any-start.png": _picture(losses)})


def _before(sweep: Sweep, known: Known) -> float | None:
    """The held-out loss before training, which no seed changes; None until a seed that measures it is known."""
    results = measures.above_0(sweep, known).values()
    return next((result["before"]["loss"] for result in results), None)


def _picture(losses: Mapping[str, Spread | None]) -> figures.Figure:
    by_base = [method for methods in zip(*STARTS.values(), strict=True) for method in methods]
    figure, (axes,) = figures.panels([f"{measures.TASKS['gsm8k']}, base in 4 bits, rank 16"], height=2.6)
    figures.gaps(axes, {method: losses[method] for method in (*by_base, "loftq")}, "qlora", "loss")
    figures.note(figure, figures.GAP_NOTE)
    return figure
