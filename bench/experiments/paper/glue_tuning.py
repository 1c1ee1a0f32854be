"""The cell of an encoder that learns a task of GLUE, as appendix L of the paper has it."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset, disable_progress_bars
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from bench.experiments.callbacks import MoveRanks
from bench.experiments.evaluation import glue
from bench.experiments.experiment import Cell, Options, Result
from bench.experiments.methods import METHODS, Setting
from bench.experiments.models import adapter_fields, load_classifier
from bench.experiments.numbers import log_of, rounded
from bench.experiments.paper.given import device, given
from bench.experiments.presets import PAPER_NLU, Preset, training_arguments
from pissa.cli.run_folder import last_checkpoint

FULL_RATE = 2e-5
"""Of full fine-tuning, for which the paper names no rate: that of transformers' own example, run_glue.py. LoRA's rates
are five to twenty times as large."""
EVAL_BATCH = 128


@dataclass(frozen=True)
class GlueTuning(Cell):
    """One training, scored after each epoch. What it has trained is kept in `folder`, and its last checkpoint, one for
    each epoch, until it is finished: a cell that was interrupted goes on from there. AdaLoRA begins anew: PEFT keeps
    the state that its ranks move by in no file."""

    kind: ClassVar[str] = "paper_nlu"
    model: str
    task: str
    method: str
    seed: int = 0

    def prepare(self, options: Options) -> None:
        given(options, "encoder")

    def folder(self, options: Options) -> Path:
        return options.trained / self.kind / self.model / f"{self.task}-{self.method}-{self.seed}"

    def run(self, options: Options) -> Result:
        preset = preset_of(self.method, self.task)
        if options.quick:
            preset = replace(preset, epochs=2)
        options, folder = given(options, "encoder"), self.folder(options)
        checkpoints = folder / "checkpoints"
        reached = None if METHODS[self.method].moves_ranks else last_checkpoint(checkpoints)
        disable_progress_bars()
        trainer = self._trainer(options, preset, checkpoints)
        trainer.train(resume_from_checkpoint=reached and str(reached))
        trainer.save_model(str(folder))
        shutil.rmtree(checkpoints, ignore_errors=True)  # AdaLoRA has none
        history = trainer.state.log_history
        return {
            "scores": {part: _epochs(history, f"eval_{part}_") for part in glue.TASKS[self.task].evaluated},
            **log_of(trainer),
            "steps": trainer.state.global_step,
            "resumed_after": int(reached.name.rpartition("-")[2]) if reached else 0,
        }

    def _trainer(self, options: Options, preset: Preset, checkpoints: Path) -> Trainer:
        task, method, source = glue.TASKS[self.task], METHODS[self.method], str(options.path("glue"))
        tokenizer = AutoTokenizer.from_pretrained(options.model)

        def data(part: str) -> Dataset:
            return glue.encode(glue.load(self.task, source, part), tokenizer, preset.max_length)

        train = data("train")
        torch.manual_seed(self.seed)  # the head
        model = load_classifier(str(options.model), task).to(device())
        fields = adapter_fields(preset, model)
        steps = math.ceil(len(train) / preset.batch) * preset.epochs
        setting = Setting(preset.rank, self.seed, steps, fields["task_type"], fields["target_modules"])
        setting = setting._replace(alpha=preset.alpha, modules_to_save=fields["modules_to_save"])
        arguments: dict[str, Any] = {
            **training_arguments(preset, str(checkpoints), preset.batch),
            "per_device_eval_batch_size": EVAL_BATCH,
            "seed": self.seed,
            "logging_strategy": "epoch",
            "eval_strategy": "epoch",
            "save_strategy": "no" if method.moves_ranks else "epoch",
            "save_total_limit": 1,
            "disable_tqdm": True,
        }
        trainer = Trainer(
            method.wrap(model, setting),
            TrainingArguments(**arguments),
            train_dataset=train,
            eval_dataset={part: data(part) for part in task.evaluated},
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda found: glue.scores(self.task, found.predictions, found.label_ids),
            callbacks=[MoveRanks()] if method.moves_ranks else [],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


def preset_of(method: str, task: str) -> Preset:
    """The paper's for PiSSA. Of the others it names LoRA's alone, which all have, but for the rate of full
    fine-tuning."""
    if method == "pissa":
        return PAPER_NLU["PiSSA"][task]
    lora = PAPER_NLU["LoRA, Kaiming start"][task]
    return replace(lora, learning_rate=FULL_RATE) if METHODS[method].full else lora


def _epochs(history: list[dict[str, Any]], prefix: str) -> dict[str, list[float | None]]:
    """Each score by epoch."""
    timings = ("loss", "runtime", "samples_per_second", "steps_per_second")
    names = {key: key.removeprefix(prefix) for row in history for key in row if key.startswith(prefix)}
    return {
        name: [rounded(row[key]) for row in history if key in row] for key, name in names.items() if name not in timings
    }
