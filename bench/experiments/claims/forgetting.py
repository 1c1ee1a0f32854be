"""Forgetting: the loss on prose that belongs to no task, before and after training, at each method's best rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from bench.experiments import figures, grid, measures, tables
from bench.experiments.claims.methods import DENSE, FOUR_BIT, TASKS, sweeps
from bench.experiments.experiment import Cell, Experiment, Known, Options, Result, Section
from bench.experiments.figures import label
from bench.experiments.grid import wanted
from bench.experiments.sweep import SEEDS, Spread, Sweep, loss_of


CURVED = {"lora": (), "pissa": (), "medium": SEEDS, "minor": SEEDS, "full": (), "rslora": ()}
"""The methods with a loss on prose at each rate, and the seeds that follow at the best one."""


def curves(options: Options) -> dict[str, Sweep]:
    """Seed 3's."""
    each = {method: grid.language_sweep("gsm8k", method) for method in CURVED}
    return {
        method: grid.sized(replace(sweep, cell=replace(sweep.cell, seed=3), seeds=CURVED[method]), options)
        for method, sweep in each.items()
    }


class Forgetting(Experiment):
    name = "forgetting"
    title = "What is forgotten"
    claim = "nothing of this. MiLoRA (arXiv 2406.09044) trains the minor components instead, so that less is forgotten"

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        best = wanted([sweep for task in TASKS for sweep in sweeps(task, options).values()], known, options)
        return [*best, *wanted(curves(options).values(), known, options)]

    def section(self, known: Known, options: Options) -> Section:
        text = []
        figure, axes = figures.panels([measures.TASKS[task] for task in TASKS], height=2.6)
        for one, task in zip(axes, TASKS, strict=True):
            results = {m: measures.above_0(sweep, known).values() for m, sweep in sweeps(task, options).items()}
            lost = {method: measures.mean_of(found, forgotten) for method, found in results.items()}
            losses = {method: measures.mean_of(found, loss_of) for method, found in results.items()}
            before = {method: measures.mean_of(found, partial(prose, "before")) for method, found in results.items()}
            columns = _means(before), tables.column(lost), tables.column(losses)
            rows = [[label(method), *(column[method] for column in columns)] for method in results]
            head = ["loss on prose before", "forgotten: its increase", "loss on the task"]
            text.append(tables.table([f"{measures.TASKS[task]}, rank 16", *head], rows))
            text.append(measures.verdict(lost, "increase on prose"))
            _draw(one, losses, lost)
        figures.legend(figure, (*DENSE, *FOUR_BIT), "n = 2 seeds, bars: their deviation; each method at its best rate")
        return Section("\n\n".join(text), {"forgetting.png": figure})


def prose(when: str, result: Result) -> float:
    """The loss on it, before or after; infinite, None in the files, where training diverged."""
    loss = result[when]["unrelated"]
    return math.inf if loss is None else float(loss)


def forgotten(result: Result) -> float:
    return prose("after", result) - prose("before", result)


def _means(spreads: Mapping[str, Spread | None]) -> dict[str, str]:
    """Without deviations: nothing is drawn before training."""
    return {method: tables.number(spread.mean if spread else None) for method, spread in spreads.items()}


def _draw(axes: figures.Axes, losses: Mapping[str, Spread | None], lost: Mapping[str, Spread | None]) -> None:
    for method, one in losses.items():
        other = lost[method]
        if one is not None and other is not None:
            figures.dot(axes, method, one, other)
    axes.set_xlabel("held-out loss on the task (nats)")
    axes.set_ylabel("increase on prose (nats)")
