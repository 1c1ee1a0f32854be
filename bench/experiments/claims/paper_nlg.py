"""Table 2 at its own size: models of 7 billion parameters that learn mathematics, programming and conversation.

It wants a GPU, --full, --model, and --data with what is trained on: metamath (tested on gsm8k and math, where they are
given), codefeedback (human-eval; mbpp, where it is given), evol-instruct (mt-bench).
"""

from __future__ import annotations

from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.paper.given import model_name
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

SEEDS = (0, 1, 2)
QUICK = ("full", "lora", "qpissa_5")
"""On the first data set; PiSSA on the others."""


class PaperNlg(Experiment):
    name = "paper-nlg"
    title = "Table 2 at its own size"
    claim = "table 2: PiSSA is above LoRA on five tasks, mostly above full fine-tuning; three seeds, one rate for all"

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        """Each training, and its tests behind it once it is there. Methods follow each other, then seeds, then data."""
        if not (options.full or options.quick):
            return []
        return [cell for training in _trainings(options) for cell in (training, *tests(training, known, options))]

    def section(self, known: Known, options: Options) -> Section:
        tables = [found for model in models(options) if (found := comparison(model, _seeds, known))]
        made = f"Made by `{COMMAND.format(self.name)}`: 100,000 examples, rank 128, batches of 128, rate 2e-5."
        return Section("\n\n".join([*tables, f"{made} {NOTES}"]))


def _seeds(model: str, data: str, method: str) -> list[InstructionTuning]:
    return [InstructionTuning(model, data, method, seed=seed) for seed in SEEDS]


def _trainings(options: Options) -> list[InstructionTuning]:
    model = model_name(options)
    if options.quick:
        first, *others = DATA
        pairs = [*((first, method) for method in QUICK), *((data, "pissa") for data in others)]
        return [InstructionTuning(model, data, method) for data, method in pairs]
    each = [[_seeds(model, data, method) for method in METHOD_NAMES] for data in data_sets(options)]
    return [seeds[i] for methods in each for i in range(len(SEEDS)) for seeds in methods]
