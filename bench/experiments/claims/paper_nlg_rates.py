"""Table 2 with every method at its own best rate: `paper-nlg`, and a sweep around the paper's rate.

The best rate is that of the least loss on held-out training data, on seed 0; its three seeds are tested.
"""

from __future__ import annotations

from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.methods import METHODS
from bench.experiments.paper.given import TINY, model_name
from bench.experiments.paper.instruction_tuning import InstructionTuning
from bench.experiments.paper.table_2 import (
    COMMAND,
    DATA,
    METHOD_NAMES,
    NOTES,
    comparison,
    data_sets,
    models,
    tests,
)
from bench.experiments.sweep import Sweep
from bench.experiments.tables import rate, table

QUICK = ("lora",)


class PaperNlgRates(Experiment):
    name = "paper-nlg-rates"
    title = "Table 2 at its own size, every method at its best rate"
    claim = "critics (arXiv 2602.04998): once rates are tuned, methods are within 1 to 2 %"

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        """Each sweep, one after the other, and the tests of its best rate."""
        if not (options.full or options.quick):
            return []
        model = model_name(options)
        data = ["metamath"] if options.quick else data_sets(options)
        sweeps = [_sweep(model, name, method) for name in data for method in (QUICK if options.quick else METHOD_NAMES)]
        return [cell for sweep in sweeps for cell in (*sweep.wanted(known), *_tests(sweep, known, options))]

    def section(self, known: Known, options: Options) -> Section:
        parts = []
        for model in models(options):
            best = {method: [_sweep(model, data, method).best(known) for data in DATA] for method in METHOD_NAMES}
            if any(found is not None for rates in best.values() for found in rates):
                rows = [[METHODS[method].label, *map(rate, rates)] for method, rates in best.items()]
                tested = comparison(model, lambda *at: _at_best(_sweep(*at), known), known)
                parts += [tested, f"Best rates:\n\n{table(['', *DATA], rows)}"]
        made = f"Made by `{COMMAND.format(self.name)}`: seven trainings or more where `paper-nlg` has three."
        return Section("\n\n".join([*(parts or ["Not yet measured."]), f"{made} {NOTES}"]))


def _sweep(model: str, data: str, method: str) -> Sweep:
    """Around the paper's rate, which is a training of `paper-nlg` too."""
    middle = InstructionTuning(model, data, method)
    return Sweep(middle, seeds=(), points=3, extends=False) if model == TINY else Sweep(middle)


def _at_best(sweep: Sweep, known: Known) -> list[InstructionTuning]:
    best = sweep.best(known)
    return [] if best is None else [sweep.at(best, seed) for seed in (0, *sweep.seeds)]


def _tests(sweep: Sweep, known: Known, options: Options) -> list[Cell]:
    return [cell for training in _at_best(sweep, known) for cell in tests(training, known, options)]
