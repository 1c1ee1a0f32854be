"""Alpha beside the rate: what each of them does to LoRA and to PiSSA."""

from __future__ import annotations

from dataclasses import replace

from bench.experiments import figures, grid, measures, tables
from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.sweep import Sweep

SCALINGS = {"lora": 1, "rslora": 4, "lora_256": 16, "loraplus": 1, "pissa": 1, "pissa_64": 4, "pissa_256": 16}
"""alpha / r, of rsLoRA alpha / sqrt(r)."""


def sweeps(options: Options) -> dict[str, Sweep]:
    each = {method: grid.language_sweep("gsm8k", method) for method in SCALINGS}
    each["pissa_256"] = replace(each["pissa_256"], points=3, seeds=())
    return {method: grid.sized(sweep, options) for method, sweep in each.items()}


class Alpha(Experiment):
    name = "alpha"
    title = "Alpha and the rate"
    claim = "nothing of this: alpha = r. arXiv 2606.12883 says that alpha does what a rate cannot"

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        return grid.wanted(sweeps(options).values(), known, options)

    def section(self, known: Known, options: Options) -> Section:
        return Section("")
