"""Figure 2a: a perceptron that has learned MNIST's odd digits learns the even ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import mean

from bench.experiments import figures, grid, measures, tables
from bench.experiments.experiment import Cell, Experiment, Known, Options, Result, Section
from bench.experiments.mnist import EPOCHS, MnistCell
from bench.experiments.sweep import Spread, Sweep, loss_of

METHODS = ("lora", "pissa", "full")
MIDDLE = 2e-3
PAPERS_RATE = 5e-4
SEEDS = (1, 2, 3, 4)
"""Of every rate, after 0."""


def sweeps(options: Options) -> dict[str, Sweep]:
    return {method: grid.sized(Sweep(MnistCell(method, MIDDLE), SEEDS), options) for method in METHODS}


class Mnist(Experiment):
    name = "mnist"
    title = "Digits: a perceptron at equal rates and at the best ones"
    claim = "figure 2a: PiSSA converges faster than LoRA and to a lower loss, at one rate for all, 5e-4"

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        each = sweeps(options).values()
        found = list(grid.wanted(each, known, options))
        seeds = max((sweep.seeds for sweep in each), key=len)
        return [*found, *(replace(cell, seed=seed) for cell in found for seed in seeds)]

    def section(self, known: Known, options: Options) -> Section:
        each = sweeps(options)
        rates = sorted({rate for sweep in each.values() for rate in sweep.losses(known)})
        names = [figures.label(method) for method in METHODS]
        head = ["rate", *names, *(f"{name}: accuracy, %" for name in names)]
        equal = [
            [
                tables.rate(rate),
                *tables.column({m: _at(each[m], rate, known, _last) for m in METHODS}).values(),
                *tables.column(
                    {m: _at(each[m], rate, known, measures.accuracy) for m in METHODS}, 1, largest=True
                ).values(),
            ]
            for rate in rates
        ]
        parts = [
            f"Training loss after {EPOCHS} epochs, and held-out accuracy, at one rate for all:",
            tables.table(head, equal),
            "Each at its own best rate, by the held-out loss:",
            _best(each, known),
            " ".join(_meaning(each, known)),
            "Pixels are raw, and so logits are large and a wrong answer costs much: the least held-out loss and the "
            "best accuracy need not have the same rate.",
        ]
        return Section("\n\n".join(parts), {"mnist.png": _picture(each, rates, known)})


def _best(each: dict[str, Sweep], known: Known) -> str:
    def column(measure: Callable[[Result], float], digits: int = 4, largest: bool = False) -> dict[str, str]:
        found = {method: measures.over_seeds(sweep, known, measure) for method, sweep in each.items()}
        return tables.column(found, digits, largest)

    columns = [column(_last), column(loss_of), column(measures.accuracy, 1, largest=True)]
    rows = [
        [figures.label(method), tables.rate(sweep.best(known)), *(column[method] for column in columns)]
        for method, sweep in each.items()
    ]
    return tables.table(["method", "best rate", "training loss", "held-out loss", "accuracy, %"], rows)


def _results(sweep: Sweep, rate: float | None, known: Known) -> list[Result]:
    """Those of all seeds at a rate."""
    cells = [] if rate is None else [sweep.at(rate, seed) for seed in (0, *sweep.seeds)]
    return [known[cell] for cell in cells if cell in known]


def _at(sweep: Sweep, rate: float, known: Known, measure: Callable[[Result], float]) -> Spread | None:
    return measures.mean_of(_results(sweep, rate, known), measure)


def _losses(result: Result) -> list[float]:
    return [math.inf if loss is None else loss for loss in result["losses"]]


def _last(result: Result) -> float:
    return _losses(result)[-1]


def _meaning(each: dict[str, Sweep], known: Known) -> list[str]:
    """Which is ahead at the paper's rate and at the best ones, and how soon PiSSA has LoRA's last loss."""
    found = []
    pairs = {
        f"At the paper's rate, {tables.rate(PAPERS_RATE)},": (PAPERS_RATE, PAPERS_RATE),
        "Each at its best rate": (each["lora"].best(known), each["pissa"].best(known)),
    }
    for where, rates in pairs.items():
        lora, pissa = (
            _results(each[method], rate, known) for method, rate in zip(("lora", "pissa"), rates, strict=True)
        )
        if lora and pissa:
            target = mean(map(_last, lora))
            curve = [mean(at) for at in zip(*map(_losses, pissa), strict=True)]
            reached = next((epoch for epoch, loss in enumerate(curve) if loss <= target), None)
            when = f"after {reached} epochs" if reached is not None else "in none of the epochs"
            found.append(f"{where} PiSSA has LoRA's last training loss {when} of {len(curve)}.")
    return found


def _picture(each: dict[str, Sweep], rates: list[float], known: Known) -> figures.Figure:
    titles = [f"all at {tables.rate(PAPERS_RATE)}, the paper's rate", "each at its best rate", "after training"]
    figure, (equal, best, swept) = figures.panels(titles)
    for axes, chosen in (
        (equal, dict.fromkeys(each, PAPERS_RATE)),
        (best, {m: s.best(known) for m, s in each.items()}),
    ):
        curves = {m: [_points(result) for result in _results(each[m], rate, known)] for m, rate in chosen.items()}
        figures.against_steps(axes, {method: seeds for method, seeds in curves.items() if seeds})
        axes.set_xlabel("epoch")
        axes.set_ylabel("training loss (nats)")
        axes.set_yscale("log")
        axes.locator_params(axis="x", nbins=5)
    at_rates = {m: {rate: _at(sweep, rate, known, loss_of) for rate in rates} for m, sweep in each.items()}
    lines = {m: {rate: found for rate, found in line.items() if found is not None} for m, line in at_rates.items()}
    figures.lines(swept, {method: line for method, line in lines.items() if line})
    swept.set_xscale("log")
    swept.set_yscale("log")
    swept.set_xlabel("learning rate")
    swept.set_ylabel("held-out loss (nats)")
    figures.legend(figure, METHODS, "n = 5 seeds: mean; pale: lowest to highest; bars: deviation")
    return figure


def _points(result: Result) -> list[list[float]]:
    """Ten of the epochs."""
    losses = _losses(result)
    return [[epoch, losses[epoch]] for epoch in range(0, len(losses), max(1, len(losses) // 10))]
