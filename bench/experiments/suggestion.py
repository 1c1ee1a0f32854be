"""The cell of a suggested rate: what `pissa.suggest_lr` suggests for a method on a task."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

import pissa
from bench.experiments.experiment import Cell, Options, Result
from bench.experiments.language import LanguageCell, load_model, make_trainer, task_of
from bench.experiments.methods import METHODS, Setting

BATCHES = 30


@dataclass(frozen=True)
class SuggestionCell(Cell):
    """One suggestion, from the first batches that a training with this seed gets."""

    kind: ClassVar[str] = "suggestion"
    task: str
    method: str
    r: int
    seed: int = 0

    def prepare(self, options: Options) -> None:
        task_of(self.task, options)

    def run(self, options: Options) -> Result:
        task, method = task_of(self.task, options), METHODS[self.method]
        model = method.wrap(
            load_model(task.folder, method, options.quick), Setting(self.r, self.seed, task.steps, "CAUSAL_LM")
        )
        unrated = LanguageCell(self.task, self.method, self.r, rate=0.0, seed=self.seed)
        with tempfile.TemporaryDirectory() as out:
            trainer = make_trainer(model, task, unrated, Path(out))
            batches = list(islice(trainer.get_train_dataloader(), 4 if options.quick else BATCHES))
        begun = time.process_time()
        found = pissa.suggest_lr(model, batches)
        return {
            "rate": found.rate,
            "text": found.text,
            "batches": len(batches),
            "seconds": round(time.process_time() - begun, 1),
        }
