"""What is forgotten: the loss on prose that no task has, before and after training, at each method's best rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

from bench.experiments import figures, measures, tables
from bench.experiments.claims.methods import DENSE, FOUR_BIT, TASKS, sweeps
from bench.experiments.experiment import Cell, Experiment, Known, Options, Result, Section
from bench.experiments.figures import label
from bench.experiments.grid import wanted
from bench.experiments.sweep import Spread


class Forgetting(Experiment):
    name = "forgetting"
    title = "What is forgotten"
    claim = "nothing of this. MiLoRA (arXiv 2406.09044) trains the minor components instead, so that less is forgotten"

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        return wanted([sweep for task in TASKS for sweep in sweeps(task, options).values()], known, options)

    def section(self, known: Known, options: Options) -> Section:
        text = []
        figure, axes = figures.panels([measures.TASKS[task] for task in TASKS], height=2.6)
        for one, task in zip(axes, TASKS, strict=True):
            results = {m: measures.above_0(sweep, known).values() for m, sweep in sweeps(task, options).items()}
            found = {
                head: {method: measures.mean_of(of_method, measure) for method, of_method in results.items()}
                for head, measure in _COLUMNS.items()
            }
            _, _, lost, won = found.values()
            text += [_table(task, found), measures.verdict(lost, "increase on prose")]
            _draw(one, won, lost)
        figures.legend(figure, (*DENSE, *FOUR_BIT), "n = 2 seeds, bars: their deviation; each method at its best rate")
        return Section("\n\n".join(text), {"forgetting.png": figure})


def loss_on(what: str, when: str, result: Result) -> float:
    """Infinite, None in the files, where training diverged."""
    loss = result[when][what]
    return math.inf if loss is None else float(loss)


def forgotten(result: Result) -> float:
    return loss_on("unrelated", "after", result) - loss_on("unrelated", "before", result)


def gained(result: Result) -> float:
    return loss_on("loss", "before", result) - loss_on("loss", "after", result)


_COLUMNS: dict[str, Callable[[Result], float]] = {
    "prose before": partial(loss_on, "unrelated", "before"),
    "prose after": partial(loss_on, "unrelated", "after"),
    "forgotten: increase on prose": forgotten,
    "gained: decrease on the task": gained,
}


def _table(task: str, found: Mapping[str, Mapping[str, Spread | None]]) -> str:
    """
    Args:
        found: by column and method.
    """
    columns = [
        tables.column(found[head], largest=measure is gained) if measure in (forgotten, gained) else _plain(found[head])
        for head, measure in _COLUMNS.items()
    ]
    rows = [[label(method), *(column[method] for column in columns)] for method in (*DENSE, *FOUR_BIT)]
    return tables.table([f"{measures.TASKS[task]}, rank 16", *_COLUMNS], rows)


def _plain(spreads: Mapping[str, Spread | None]) -> dict[str, str]:
    return {method: tables.measured(spread) for method, spread in spreads.items()}


def _draw(axes: figures.Axes, won: Mapping[str, Spread | None], lost: Mapping[str, Spread | None]) -> None:
    for method, one in won.items():
        other = lost[method]
        if one is not None and other is not None:
            figures.dot(axes, method, one, other)
    axes.set_xlabel("gained: decrease on the task (nats)")
    axes.set_ylabel("forgotten: on prose (nats)")
