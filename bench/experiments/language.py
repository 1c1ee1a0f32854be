"""The cell of a language model: SmolLM2, or another, fine-tuned by TRL's SFTTrainer and evaluated on data that it has
not seen."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset, disable_progress_bars
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback
from trl import SFTConfig, SFTTrainer

import pissa
from bench.experiments.experiment import Cell, Options, Result
from bench.experiments.language_tasks import LanguageTask, load_task
from bench.experiments.methods import METHODS, Method, MoveRanks, Reading, Setting, warm
from bench.experiments.numbers import log_of, rounded
from bench.experiments.sweep import SEEDS
from pissa.cli.data import IGNORED

CURVE = 5
"""Evaluations, for the seeds of a best rate."""
EVAL_BATCH = 8
GENERATED = 50
"""Problems that are answered together."""
LONGEST_ANSWER = 8
"""Tokens; a sum has at most five, with the end of the turn."""
ATTENTION = "eager"  # at these lengths a step takes 12% less than with sdpa on a CPU


@dataclass(frozen=True)
class LanguageCell(Cell):
    """One training. Seeds above 0 also record the loss on text that has nothing to do with the task, and exact answers
    as they are generated; or, where there are none, seeds 1 and 2 on a dense base the held-out loss on the way."""

    kind: ClassVar[str] = "language"
    task: str
    method: str
    r: int
    rate: float
    seed: int = 0

    def prepare(self, options: Options) -> None:
        task_of(self.task, options)
        if reading := METHODS[self.method].reading:
            calibration_of(self.task, reading, options)

    def run(self, options: Options) -> Result:
        task, method = task_of(self.task, options), METHODS[self.method]
        begun = time.process_time()
        model = load_model(task.folder, method, options.quick)
        setting = Setting(self.r, self.seed, task.steps, "CAUSAL_LM", file=task.file)
        if method.reading:
            setting = setting._replace(calibration=calibration_of(self.task, method.reading, options))
        model = method.wrap(model, setting)
        started = time.process_time()
        with tempfile.TemporaryDirectory() as out:
            trainer = make_trainer(model, task, self, Path(out))
            before = _measures(trainer, task, trainer.evaluate()) if self.seed > 0 else None
            evaluated = time.process_time()
            trainer.train()
            trained = time.process_time()
            curve = [row for row in trainer.state.log_history if "eval_loss" in row]
            after = _measures(trainer, task, curve[-1] if curve else trainer.evaluate())
        if task.exact and self.seed > 0:
            after["generated"] = generated(model, task)
        result: Result = {
            "after": after,
            **log_of(trainer),
            "steps": task.steps,
            "batch": task.batch,
            # The evaluations of a curve are in the time of training: only seed 0 has none.
            "seconds": {
                "start": round(started - begun, 1),
                "training": round(trained - evaluated, 1),
            },
        }
        if self.seed > 0:
            result["before"] = before
            result["curve"] = [[row["step"], rounded(row["eval_loss"])] for row in curve]
        return result


@cache
def task_of(name: str, options: Options) -> LanguageTask:
    warm()
    return load_task(name, options)


@cache
def calibration_of(name: str, reading: Reading, options: Options) -> pissa.Calibration:
    """The calibration of the dense model. All cells with this reading share it."""
    task = task_of(name, options)
    model = load_model(task.folder, METHODS["lora"], options.quick)
    batches = [torch.tensor([row["input_ids"]]) for row in task.texts(reading.text, reading.examples)]
    return reading.of(pissa.calibrate(model, batches, target_modules="all-linear"))


def load_model(folder: Path, method: Method, tiny: bool) -> nn.Module:
    dtype = torch.float32 if method.full else torch.bfloat16
    if not tiny:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_cache=False, attn_implementation=ATTENTION)
    config = AutoConfig.from_pretrained(folder, dtype=dtype, use_cache=False)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config.update(sizes | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)


class _LabelledTrainer(SFTTrainer):
    """Computes logits from the first label on alone, and the loss from those with a label. TRL's own loss reads all
    262,144 logits of a token in tiles, several times: more than half of a step."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        given = dict(inputs)
        targets = given.pop("labels")[:, 1:]
        counted = targets != IGNORED
        first = 0 if self.compute_metrics else int(counted.any(0).nonzero()[0])
        # As indices: of a slice, which is not contiguous, torch's product in bfloat16 takes 18 times as long.
        places = torch.arange(first, targets.shape[1] + 1)
        outputs = model(**given, use_cache=False, logits_to_keep=places)
        kept = outputs.logits[:, :-1][counted[:, first:]]
        loss = nn.functional.cross_entropy(kept.float(), targets[counted])
        return (loss, outputs) if return_outputs else loss


def make_trainer(model: Any, task: LanguageTask, cell: LanguageCell, out: Path) -> SFTTrainer:
    """AdamW without weight decay; the rate falls by a cosine after a warm-up of a twentieth of the steps; gradients are
    cut at norm 1. A base and its activations are bfloat16, adapters and their products float32."""
    method = METHODS[cell.method]
    disable_progress_bars()
    curved = cell.seed in SEEDS and method.dense and not (task.exact or task.file)
    curve = {"eval_strategy": "steps", "eval_steps": max(1, task.steps // CURVE)} if curved else {}
    args = SFTConfig(
        output_dir=str(out),
        max_steps=task.steps,
        per_device_train_batch_size=task.batch,
        per_device_eval_batch_size=EVAL_BATCH,
        learning_rate=cell.rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, task.steps // 20),
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=method.full,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=cell.seed,
        max_length=None,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        **curve,
    )
    optimizer = method.optimizer(model, cell.rate) if method.optimizer else None
    trainer = (_LabelledTrainer if task.file else SFTTrainer)(
        model,
        args=args,
        train_dataset=Dataset.from_list(task.train),
        eval_dataset=Dataset.from_list(task.held_out),
        processing_class=task.tokenizer,
        compute_metrics=_accuracy if task.exact else None,
        preprocess_logits_for_metrics=_greedy if task.exact else None,
        optimizers=(optimizer, None),
        callbacks=[MoveRanks()] if method.moves_ranks else [],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _measures(trainer: SFTTrainer, task: LanguageTask, found: Mapping[str, float]) -> dict[str, float | None]:
    """The loss of held-out answers and of unrelated text, means over batches of means over tokens; and the share of
    answers that are right to the last token. `found` is what the trainer's evaluation of the answers has found."""
    measured = {"loss": found["eval_loss"]}
    if task.exact:
        measured["accuracy"] = found["eval_accuracy"]
    if trainer.args.seed > 0:
        unrelated = trainer.evaluate(Dataset.from_list(task.unrelated), metric_key_prefix="unrelated")
        measured["unrelated"] = unrelated["unrelated_loss"]
    return {name: rounded(value) for name, value in measured.items()}


def generated(model: Any, task: LanguageTask) -> float | None:
    """The share of held-out answers that greedy decoding gives. Its stripped first line counts."""
    tokenizer, right = task.tokenizer, 0
    for begin in range(0, len(task.held_out), GENERATED):
        rows = task.held_out[begin : begin + GENERATED]
        starts = [row["labels"].count(IGNORED) for row in rows]
        prompts = [row["input_ids"][:start] for row, start in zip(rows, starts, strict=True)]
        expected = [row["input_ids"][start:] for row, start in zip(rows, starts, strict=True)]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        ends = [tokenizer.eos_token_id, expected[0][-1]]  # of a text, and of a turn
        found = model.eval().generate(
            **inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False, use_cache=True, eos_token_id=ends
        )
        answers, wanted = (
            tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for tokens in (found[:, inputs["input_ids"].shape[1] :], expected)
        )
        pairs = zip(answers, wanted, strict=True)
        right += sum(answer.partition("\n")[0].strip() == want.strip() for answer, want in pairs)
    return rounded(right / len(task.held_out))


def _greedy(logits: Any, labels: Any) -> torch.Tensor:
    """The tokens that greedy decoding would take, each after the right ones before it."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _accuracy(predictions: Any) -> dict[str, float]:
    """The share of rows of which all tokens with a label are the greedy ones: then, and only then, greedy decoding
    gives the answer, token by token."""
    labels, greedy = predictions.label_ids[:, 1:], predictions.predictions[:, :-1]
    return {"accuracy": float(((labels == greedy) | (labels == IGNORED)).all(axis=1).mean())}
