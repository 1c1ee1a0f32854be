"""The cell of a language model that learns to follow instructions, as section 5 of the paper has it."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback
from trl import SFTConfig, SFTTrainer

import pissa
from bench.experiments.data import instructions
from bench.experiments.experiment import Cell, Options, Result
from bench.experiments.methods import METHODS, Setting
from bench.experiments.models import load_language_model
from bench.experiments.numbers import log_of, rounded
from bench.experiments.paper import tiny
from bench.experiments.paper.given import device, from_environment, given
from bench.experiments.presets import PAPER_NLG, Preset, sft_arguments
from pissa.cli.run_folder import last_checkpoint

if TYPE_CHECKING:
    from torch import nn

HELD_OUT = 512
"""Examples behind those that are trained on; a seventh of them if there are no more."""
PER_DEVICE = "PAPER_BATCH"
"""The environment variable that says how many examples are computed at once, a divisor of 128; 8 if it is not set."""


@dataclass(frozen=True)
class InstructionTuning(Cell):
    """One training. What it has trained is kept in `folder`, and its last checkpoint until it is finished: a cell that
    was interrupted goes on from there."""

    kind: ClassVar[str] = "paper_nlg"
    model: str
    data: str
    method: str
    rate: float = PAPER_NLG.learning_rate
    seed: int = 0

    def prepare(self, options: Options) -> None:
        given(options, "language").path(self.data)

    def folder(self, options: Options) -> Path:
        return options.trained / self.kind / self.model / f"{self.data}-{self.method}-{self.rate:g}-{self.seed}"

    def run(self, options: Options) -> Result:
        preset, save_steps = _size(options.quick)
        options, folder = given(options, "language"), self.folder(options)
        disable_progress_bars()
        source, cache = str(options.path(self.data)), options.trained / "datasets"
        rows = instructions.load(self.data, source, (preset.rows or 0) + HELD_OUT, cache)
        held_out = min(HELD_OUT, math.ceil(len(rows) / 7))
        train, test = rows.select(range(len(rows) - held_out)), rows.select(range(len(rows) - held_out, len(rows)))
        checkpoints = folder / "checkpoints"
        reached = last_checkpoint(checkpoints)
        trainer = self._trainer(options, preset, save_steps, train, test, checkpoints)
        trainer.train(resume_from_checkpoint=reached and str(reached))
        after = trainer.evaluate()
        trainer.save_model(str(folder))
        shutil.rmtree(checkpoints)
        return {
            "after": {"loss": rounded(after["eval_loss"])},
            **log_of(trainer),
            "rows": len(train),
            "steps": trainer.state.global_step,
            "resumed_after": int(reached.name.rpartition("-")[2]) if reached else 0,
        }

    def _trainer(
        self, options: Options, preset: Preset, save_steps: int, train: Dataset, test: Dataset, checkpoints: Path
    ) -> SFTTrainer:
        per_device = min(from_environment(PER_DEVICE, 8), preset.batch)
        steps = math.ceil(len(train) / preset.batch) * preset.epochs
        model = METHODS[self.method].wrap(
            _base(self.method, options), Setting(preset.rank, self.seed, steps, "CAUSAL_LM", alpha=preset.alpha)
        )
        arguments: dict[str, Any] = {
            **sft_arguments(replace(preset, learning_rate=self.rate), str(checkpoints), per_device),
            "per_device_eval_batch_size": per_device,
            "seed": self.seed,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": save_steps,
            "save_total_limit": 1,
            "disable_tqdm": True,
        }
        trainer = SFTTrainer(
            model, SFTConfig(**arguments), train_dataset=train, eval_dataset=test, processing_class=tokenizer(options)
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def trained(self, options: Options) -> nn.Module:
        """What `run` has trained, in bfloat16 and in evaluation mode.

        Raises:
            SystemExit: it is not there.
        """
        options, folder = given(options, "language"), self.folder(options)
        if not folder.is_dir():
            raise SystemExit(
                f"{folder} is not there, which the training has left: bring it here, or delete the training's line in "
                f"{self.kind}.jsonl to train again"
            )
        if METHODS[self.method].full:
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device())
        else:
            kind = pissa.PissaModel if (folder / "pissa.json").is_file() else PeftModel
            loaded = kind.from_pretrained(_base(self.method, options), folder)
        return loaded.bfloat16().eval()


def tokenizer(options: Options) -> PreTrainedTokenizerBase:
    """The model's, without a chat template: the prompt is Alpaca's, as the paper has it, in training and after."""
    found = AutoTokenizer.from_pretrained(given(options, "language").model)
    found.chat_template = None
    return found


def _size(quick: bool) -> tuple[Preset, int]:
    """The training, and after how many steps it is saved."""
    if quick:
        return replace(PAPER_NLG, rank=4, alpha=4, batch=4, rows=tiny.ROWS), 1
    return PAPER_NLG, 100


def _base(method: str, options: Options) -> Any:
    """float32 below a dense adapter. bfloat16 if it is trained whole, as the paper's, whose table 7 says what float32
    would change, or if it becomes 4 bits."""
    dense_adapter = METHODS[method].dense and not METHODS[method].full
    return load_language_model(str(options.model), torch.float32 if dense_adapter else torch.bfloat16).to(device())
