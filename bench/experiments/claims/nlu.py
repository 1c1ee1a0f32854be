"""Table 3: natural language understanding."""

from __future__ import annotations

from collections.abc import Mapping

from bench.experiments import figures, grid, measures, tables
from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.figures import label
from bench.experiments.sweep import Spread, Sweep

METHODS = ("full", "gaussian", "lora", "dora", "adalora", "pissa", "unit")
TASKS = ("films", "products")
PAPER = {
    "full": ("95.63", "88.25"),
    "gaussian": ("94.95", "88.50"),
    "lora": ("95.64", "88.62"),
    "dora": ("95.79", "88.98"),
    "adalora": ("96.10", "89.46"),
    "pissa": ("96.22", "89.83"),
}
"""Table 3, DeBERTa-v3-base: SST-2, which is nearest to ours, and the mean of the eight tasks."""


def sweeps(task: str, options: Options) -> dict[str, Sweep]:
    return {method: grid.sized(grid.encoder_sweep(task, method), options) for method in METHODS}


class NLU(Experiment):
    name = "nlu"
    title = "Understanding language"
    claim = "table 3: PiSSA is above LoRA, DoRA, AdaLoRA and full fine-tuning on GLUE, on average and in 6 of 8 tasks"

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        return grid.wanted([sweep for task in TASKS for sweep in sweeps(task, options).values()], known, options)

    def section(self, known: Known, options: Options) -> Section:
        each = {task: sweeps(task, options) for task in TASKS}
        losses = {t: {m: measures.over_seeds(s, known) for m, s in of_t.items()} for t, of_t in each.items()}
        right = {
            t: {m: measures.over_seeds(s, known, measures.accuracy) for m, s in of_t.items()}
            for t, of_t in each.items()
        }
        texts = {t: (tables.column(losses[t]), tables.column(right[t], 1, largest=True)) for t in TASKS}
        rows = [
            [
                label(method),
                *(
                    text
                    for t in TASKS
                    for text in (tables.rate(each[t][method].best(known)), *(column[method] for column in texts[t]))
                ),
                *PAPER.get(method, ("", "")),
            ]
            for method in METHODS
        ]
        ours = [text for task in TASKS for text in (f"{measures.TASKS[task]}: best rate", "loss", "accuracy, %")]
        head = ["rank 16 (paper: 8)", *ours, "the paper's table 3, DeBERTa-v3-base: SST-2, %", "mean of 8 tasks, %"]
        verdicts = [
            f"{measures.TASKS[t]}: {measures.verdict(losses[t])} {measures.verdict(right[t], 'accuracy', largest=True)}"
            for t in TASKS
        ]
        return Section("\n\n".join([tables.table(head, rows), *verdicts]), {"nlu.png": _picture(losses, right)})


def _picture(
    losses: Mapping[str, Mapping[str, Spread | None]], right: Mapping[str, Mapping[str, Spread | None]]
) -> figures.Figure:
    titles = [f"{measures.TASKS[task]}: {what}" for task in TASKS for what in ("loss", "accuracy")]
    figure, axes = figures.panels(titles, columns=2, height=2.3)
    for i, task in enumerate(TASKS):
        figures.gaps(axes[2 * i], losses[task], "lora", "loss")
        figures.gaps(axes[2 * i + 1], right[task], "lora", "accuracy (points)", named=False)
    figures.note(figure, figures.GAP_NOTE)
    return figure
