"""Forgetting: the loss on prose that belongs to no task, before and after training, at the best rate and at others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import takewhile

from bench.experiments import figures, grid, measures, tables
from bench.experiments.claims import methods
from bench.experiments.claims.few_steps import steps_to
from bench.experiments.experiment import Cell, Experiment, Known, Options, Result, Section
from bench.experiments.figures import label
from bench.experiments.sweep import SEEDS, Spread, Sweep, loss_of

SEED = 3
"""Measured at all rates, without the losses on the way that SEEDS have."""
CURVED = ("lora", "pissa", "medium", "minor", "full", "rslora")
"""The methods with a loss on prose at all rates."""
AT_EQUAL_LOSS = {"medium": 5e-4, "minor": 5e-4}
"""Rates at which seed 3 ends with the loss of PiSSA's best one."""


def curves(options: Options) -> dict[str, Sweep]:
    sweeps = {method: grid.language_sweep("gsm8k", method) for method in CURVED}
    return {
        method: grid.sized(replace(sweep, cell=replace(sweep.cell, seed=SEED), seeds=()), options)
        for method, sweep in sweeps.items()
    }


def sweeps(task: str, options: Options) -> dict[str, Sweep]:
    """Those of which one rate is compared, the best one or that of AT_EQUAL_LOSS."""
    others = {method: curves(options)[method] for method in AT_EQUAL_LOSS} if task == "gsm8k" else {}
    return methods.sweeps(task, options) | others


class Forgetting(Experiment):
    name = "forgetting"
    title = "What is forgotten"
    claim = (
        "nothing of this. MiLoRA (arXiv 2406.09044) trains the minor components instead, so that less is forgotten; "
        "arXiv 2602.03493 says that both ends of the spectrum forget more than what lies between"
    )

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        at_best = [sweep for task in methods.TASKS for sweep in methods.sweeps(task, options).values()]
        each = curves(options)
        equal = [each[method].at(rate, seed) for method, rate in AT_EQUAL_LOSS.items() for seed in SEEDS]
        return [*grid.wanted([*at_best, *each.values()], known, options), *([] if options.quick else equal)]

    def section(self, known: Known, options: Options) -> Section:
        text, over_rates = _over_rates(curves(options), known)
        figure, axes = figures.panels([measures.TASKS[task] for task in methods.TASKS], height=2.6)
        for one, task in zip(axes, methods.TASKS, strict=True):
            results = {method: _at_best(sweep, known) for method, sweep in sweeps(task, options).items()}
            lost = {method: measures.mean_of(found, forgotten) for method, found in results.items()}
            losses = {method: measures.mean_of(found, loss_of) for method, found in results.items()}
            before = {method: measures.mean_of(found, partial(prose, "before")) for method, found in results.items()}
            columns = _means(before), tables.column(lost), tables.column(losses)
            rows = [[label(m), *(column[m] for column in columns), tables.count(lost[m])] for m in results]
            head = ["loss on prose before", "forgotten: its increase", "loss on the task", "seeds"]
            text.append(tables.table([f"{measures.TASKS[task]}, rank 16", *head], rows))
            text.append(measures.verdict(lost, "increase on prose"))
            if task == "gsm8k":
                text += _less_pissa(losses, lost)
            for method, spread in losses.items():
                if spread is not None and (other := lost[method]) is not None:
                    figures.dot(one, method, spread, other)
            _name(one)
        names = (*methods.DENSE, *methods.FOUR_BIT, "medium", "minor")
        figures.legend(figure, names, "n = 2 or 3 seeds, bars: their deviation; each method at its best rate")
        return Section("\n\n".join(text), {"forgetting-rates.png": over_rates, "forgetting.png": figure})


def prose(when: str, result: Result) -> float:
    """The loss on it, before or after; infinite, None in the files, where training diverged."""
    loss = result[when]["unrelated"]
    return math.inf if loss is None else float(loss)


def forgotten(result: Result) -> float:
    return prose("after", result) - prose("before", result)


def _at_best(sweep: Sweep, known: Known) -> list[Result]:
    """The results with a loss on prose at the rate that is compared, in the same order of seeds for all methods."""
    rate = AT_EQUAL_LOSS.get(sweep.cell.method) or sweep.best(known)
    cells = [] if rate is None else [sweep.at(rate, seed) for seed in (*SEEDS, SEED)]
    return [known[cell] for cell in takewhile(known.__contains__, cells)]


def _over_rates(each: Mapping[str, Sweep], known: Known) -> tuple[list[str], figures.Figure]:
    """A table of what is forgotten at each rate, and its picture."""
    lines = {
        method: {rate: known[sweep.at(rate)] for rate in losses}
        for method, sweep in each.items()
        if (losses := sweep.losses(known))
    }
    target = max((min(map(loss_of, line.values())) for line in lines.values()), default=math.nan)
    figure, (axes,) = figures.panels([f"{measures.TASKS['gsm8k']}, dense base, rank 16"], height=3.4)
    rows = []
    for method, line in lines.items():
        points = [(forgotten(result), loss_of(result)) for result in line.values()]
        start = (0.0, next(iter(line.values()))["before"]["loss"])
        equal = tables.number(steps_to(target, [start, *points]), 3, sign=True)
        at_rates = [
            f"{tables.rate(rate)}: {tables.number(lost, 3, sign=True)} ({tables.number(loss, 3)})"
            for rate, (lost, loss) in zip(line, points, strict=True)
        ]
        rows.append([label(method), equal, "; ".join(at_rates)])
        seen = [point for point in points if point[1] <= figures.HEIGHTS * target]
        axes.plot([loss for _, loss in seen], [lost for lost, _ in seen], **figures.style(method).line)
    _name(axes)
    figures.legend(figure, tuple(lines), "n = 1 seed; each line joins the rates of a sweep", columns=3)
    text = (
        f"{measures.TASKS['gsm8k']}, rank 16, seed {SEED}: increase on prose at each rate, in brackets the held-out "
        f"loss on the task; and, from low rates up, where that first reaches {tables.number(target, 3)}, as all do."
    )
    return [text, tables.table(["method", "increase at equal loss", "at each rate"], rows)], figure


def _less_pissa(losses: Mapping[str, Spread | None], lost: Mapping[str, Spread | None]) -> list[str]:
    rows = [
        [label(method), *(tables.difference(of[method], of["pissa"]) for of in (losses, lost))]
        for method in CURVED
        if method != "pissa"
    ]
    text = "The medium and the minor components are at 5e-4, where they end with PiSSA's loss on seed 3. Less PiSSA's:"
    return [text, tables.table(["method", "loss on the task", "forgotten"], rows)]


def _means(spreads: Mapping[str, Spread | None]) -> dict[str, str]:
    """Without deviations: nothing is drawn before training."""
    return {method: tables.number(spread.mean if spread else None) for method, spread in spreads.items()}


def _name(axes: figures.Axes) -> None:
    axes.set_xlabel("held-out loss on the task (nats)")
    axes.set_ylabel("increase on prose (nats)")
