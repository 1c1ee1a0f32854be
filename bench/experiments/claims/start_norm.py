"""The orthonormal start compared with the starts of PiSSA, LoRA, rsLoRA and OLoRA, at three ranks."""

from __future__ import annotations

from collections.abc import Mapping

from bench.experiments import figures, grid, measures, tables
from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.figures import label
from bench.experiments.sweep import Spread, Sweep, spread

METHODS = ("lora", "rslora", "pissa", "unit", "olora")
_THREE = ("lora", "pissa", "unit")
RANKS = (4, 16, 64)
GROUPS = {
    **{("gsm8k", r): METHODS if r == 16 else _THREE for r in RANKS},
    **{("films", r): METHODS for r in RANKS},
    ("sums", 16): METHODS,
}
"""The methods at a task and a rank."""


def sweeps(task: str, r: int, options: Options) -> dict[str, Sweep]:
    make = grid.encoder_sweep if task == "films" else grid.language_sweep
    return {method: grid.sized(make(task, method, r), options) for method in GROUPS[task, r]}


class StartNorm(Experiment):
    name = "start-norm"
    title = "The norm of the start"
    claim = (
        "not covered; PiSSA's initial factors carry the singular values. The orthonormal start has the same "
        "directions, each of norm 1"
    )

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        return grid.wanted([sweep for group in GROUPS for sweep in sweeps(*group, options).values()], known, options)

    def section(self, known: Known, options: Options) -> Section:
        each = {group: sweeps(*group, options) for group in GROUPS}
        losses = {
            group: {m: measures.over_seeds(s, known) for m, s in methods.items()} for group, methods in each.items()
        }
        text = [
            "Held-out loss at the best rate:",
            _table({group: tables.column(column) for group, column in losses.items()}),
            "The best rate and, in brackets, the width of the valley around it: decades of the rate with a loss within "
            "2% of the best (≥ where it reaches beyond the sweep), n = 1 seed:",
            _table({group: {m: _valley(s, known) for m, s in methods.items()} for group, methods in each.items()}),
            _meaning(losses),
        ]
        return Section(
            "\n\n".join(text),
            {"start-norm-rates.png": _rates(each, known), "start-norm-widths.png": _widths(each, known)},
        )


def _table(texts: Mapping[tuple[str, int], Mapping[str, str]]) -> str:
    rows = [
        [f"{measures.TASKS[task]}, rank {r}", *(columns.get(method, "") for method in METHODS)]
        for (task, r), columns in texts.items()
    ]
    return tables.table(["", *map(label, METHODS)], rows)


def _valley(sweep: Sweep, known: Known) -> str:
    width = sweep.width(known)
    if width is None:
        return tables.MISSING
    return f"{tables.rate(sweep.best(known))} ({'' if sweep.bounded(known) else '≥ '}{tables.number(width, 2)})"


def _meaning(losses: Mapping[tuple[str, int], Mapping[str, Spread | None]]) -> str:
    """In how many groups the orthonormal start is apart from PiSSA's, and from LoRA's."""
    return " ".join(_against(other, losses) for other in ("pissa", "lora"))


def _against(other: str, losses: Mapping[tuple[str, int], Mapping[str, Spread | None]]) -> str:
    pairs = [(column["unit"], column[other]) for column in losses.values()]
    known = [(one, two) for one, two in pairs if one is not None and two is not None]
    better = sum(tables.differ(one, two) and one.mean < two.mean for one, two in known)
    worse = sum(tables.differ(one, two) and one.mean > two.mean for one, two in known)
    return (
        f"The orthonormal start is better than {label(other)} by more than two standard errors in {better} of "
        f"{len(known)} rows, worse in {worse}."
    )


def _rates(each: Mapping[tuple[str, int], Mapping[str, Sweep]], known: Known) -> figures.Figure:
    titles = [f"{measures.NAMES[task]}, rank {r}" for task, r in each]
    figure, axes = figures.panels(titles, columns=3, height=2.0)
    for one, methods in zip(axes, each.values(), strict=True):
        figures.sweeps(one, methods, known)
    note = f"GSM8K and sums: SmolLM2; films: MiniLM\n{figures.SWEEP_NOTE}"
    figures.legend(figure, METHODS, note, columns=5)
    return figure


def _widths(each: Mapping[tuple[str, int], Mapping[str, Sweep]], known: Known) -> figures.Figure:
    tasks = ("gsm8k", "films")
    figure, axes = figures.panels([measures.TASKS[task] for task in tasks], height=2.2)
    for one, task in zip(axes, tasks, strict=True):
        widths: dict[str, dict[float, Spread]] = {method: {} for method in METHODS}
        for (group, r), methods in each.items():
            for method, sweep in methods.items() if group == task else ():
                if (width := sweep.width(known)) is not None:
                    widths[method][r] = spread([width])
        figures.lines(one, widths)
        figures.doubling(one, RANKS)
        one.set_ylim(bottom=0)
        one.set_ylabel("width of the valley (decades)")
    figures.legend(figure, METHODS, "n = 1 seed; decades of the rate with a loss within 2 % of the best", columns=5)
    return figure
