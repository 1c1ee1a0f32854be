"""Alpha beside the rate: what each of them does to LoRA and to PiSSA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from bench.experiments import figures, grid, measures, tables
from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.figures import label
from bench.experiments.sweep import Sweep

SCALINGS = {
    "LoRA": {"lora": 1, "rslora": 4, "lora_256": 16, "loraplus": 1},
    "PiSSA": {"pissa": 1, "pissa_64": 4, "pissa_256": 16},
}
"""alpha / r, of rsLoRA alpha / sqrt(r), by start; the first one is what the others are compared with."""


def sweeps(start: str, options: Options) -> dict[str, Sweep]:
    each = {method: grid.language_sweep("gsm8k", method) for method in SCALINGS[start]}
    if start == "PiSSA":
        each["pissa_64"] = replace(each["pissa_64"], seeds=())
        each["pissa_256"] = replace(each["pissa_256"], points=3, seeds=())
    return {method: grid.sized(sweep, options) for method, sweep in each.items()}


class Alpha(Experiment):
    name = "alpha"
    title = "Alpha and the rate"
    claim = "nothing of this: alpha = r. arXiv 2606.12883 says that alpha does what a rate cannot"

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        return grid.wanted([sweep for s in SCALINGS for sweep in sweeps(s, options).values()], known, options)

    def section(self, known: Known, options: Options) -> Section:
        lora, pissa = (sweeps(start, options) for start in SCALINGS)
        rows = [row for each in (lora, pissa) for row in _rows(each, known)]
        pairs = {method: lora[method].losses(known) for method in ("lora_256", "loraplus")}
        same = {method: _at_1(method, sweep.losses(known)) for method, sweep in pissa.items()}
        text = [
            f"{measures.TASKS['gsm8k']}, rank 16, dense base. The layer computes s B A with s = alpha / r. LoRA's "
            "alpha 64 is rsLoRA at this rank.",
            tables.table(["method", "s", "best rate", "loss", "less alpha 16's", "seeds"], rows),
            "For LoRA, alpha multiplies the rate of B alone: with AdamW, s at a rate is that rate for A and the s-fold "
            "one for B, which is LoRA+ of ratio s but for the cut of gradient norms. Losses of seed 0:",
            _side_by_side("rate", pairs),
            "PiSSA's s B0 A0 is the principal part, so that both factors are divided by √s: a rate at s is the √s-fold "
            "rate at s = 1. Losses of seed 0:",
            _side_by_side("√s times the rate", same),
        ]
        figure, axes = figures.panels(["LoRA", "PiSSA"], height=2.6)
        figures.sweeps(axes[0], lora, known)
        best = {method: _scaled(method, sweep.best(known)) for method, sweep in pissa.items()}
        figures.against_rate(axes[1], same, best)
        axes[1].set_xlabel("√s times the learning rate")
        figures.legend(figure, (*lora, *pissa), f"{measures.TASKS['gsm8k']}; {figures.SWEEP_NOTE}")
        return Section("\n\n".join(text), {"alpha.png": figure})


def _rows(each: Mapping[str, Sweep], known: Known) -> list[list[str]]:
    losses = {method: measures.over_seeds(sweep, known) for method, sweep in each.items()}
    first = next(iter(each))
    scalings = SCALINGS["LoRA"] | SCALINGS["PiSSA"]
    return [
        [
            *(label(method), str(scalings[method]), tables.rate(sweep.best(known)), tables.measured(losses[method])),
            "" if method == first else tables.difference(losses[method], losses[first]),
            tables.count(losses[method]),
        ]
        for method, sweep in each.items()
    ]


def _scaled(method: str, rate: float | None) -> float | None:
    """PiSSA's rate at s = 1 that does the same."""
    return None if rate is None else float(f"{rate * math.sqrt(SCALINGS['PiSSA'][method]):.2g}")


def _at_1(method: str, losses: Mapping[float, float]) -> dict[float, float]:
    return {scaled: loss for rate, loss in losses.items() if (scaled := _scaled(method, rate))}


def _side_by_side(head: str, losses: Mapping[str, Mapping[float, float]]) -> str:
    rates = sorted({rate for line in losses.values() for rate in line})
    rows = [[tables.rate(rate), *(tables.number(line.get(rate)) for line in losses.values())] for rate in rates]
    return tables.table([head, *map(label, losses)], rows)
