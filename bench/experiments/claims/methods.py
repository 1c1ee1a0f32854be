"""Tables 2 and 5, figure 4: every method at its own best rate."""

from __future__ import annotations

from bench.experiments import grid
from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.sweep import Sweep

DENSE = ("lora", "rslora", "pissa", "unit", "dora", "olora", "pissa_dora", "adalora", "loraplus", "full")
FOUR_BIT = ("qlora", "loftq", "qpissa_1", "qpissa_5")
TASKS = ("gsm8k", "sums")


def sweeps(task: str) -> dict[str, Sweep]:
    return {method: grid.language_sweep(task, method) for method in (*DENSE, *FOUR_BIT)}


class Methods(Experiment):
    name = "methods"
    title = "Every method at its best rate"
    claim = "tables 2, 5 and figure 4: PiSSA is above LoRA, DoRA, AdaLoRA and, mostly, full fine-tuning"

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        return grid.wanted([sweep for task in TASKS for sweep in sweeps(task).values()], known, options)

    def section(self, known: Known, options: Options) -> Section:
        return Section("")
