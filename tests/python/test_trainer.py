"""transformers' Trainer on a small Llama: it trains, saves, resumes, and reloads the best model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pissa
from language_models import Make
from pissa import PissaModel

FORMS = {"implicit": {}, "nf4": {"quant": "nf4"}}
pytestmark = pytest.mark.filterwarnings("ignore:The residual of the base is stored as:UserWarning")


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 97, (16, 9), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model: nn.Module, folder: Path, **options: object):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4,
        max_steps=6,
        learning_rate=1e-2,
        weight_decay=0.0,
        logging_steps=1,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=11,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows(), eval_dataset=rows()[:4])


def losses(run: object) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("form", FORMS)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    form: str, tiny_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    whole = trainer(pissa.wrap(tiny_llama(), r=4, **FORMS[form]), tmp_path / "whole")
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]

    resumed = trainer(pissa.wrap(tiny_llama(), r=4, **FORMS[form]), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())

    again = PissaModel.from_pretrained(tiny_llama(), tmp_path / "resumed" / "checkpoint-6")
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens).logits, whole.model.eval()(input_ids=tokens).logits)


def test_the_best_model_is_loaded_at_the_end(tiny_llama: Make, tmp_path: Path) -> None:
    model = pissa.wrap(tiny_llama(), r=4)
    run = trainer(model, tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")
    best = PissaModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-6")
    ids = rows()[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, best(input_ids=ids).logits)
