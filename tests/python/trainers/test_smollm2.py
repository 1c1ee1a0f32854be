"""A real model, SmolLM2-135M-Instruct: before training, the wrapped model is the base; TRL trains it in two stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pissa
from pissa.cli.sources import unpack_smollm2
from trainers import FORMS, forms, logged, options, quiet, unchanged

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    unpack_smollm2(folder)
    return folder


def load(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture(scope="module")
def tokens(folder: Path) -> Tensor:
    from transformers import AutoTokenizer

    text = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
    return AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_0_is_the_base_bit_for_bit(dtype: torch.dtype, folder: Path, tokens: Tensor) -> None:
    base = logits(load(folder, dtype), tokens)
    model = pissa.wrap(load(folder, dtype), r=16, task_type="CAUSAL_LM").eval()
    assert torch.equal(logits(model, tokens), base)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), base)


def test_the_4_bit_error_is_smaller_than_that_of_quantising_the_weights(folder: Path, tokens: Tensor) -> None:
    """The residual is easier to quantise than the weight: QPiSSA starts closer to the base than NF4 alone."""
    base = logits(load(folder, torch.float32), tokens)
    qpissa = pissa.wrap(load(folder, torch.float32), r=16, quant="nf4", task_type="CAUSAL_LM").eval()
    assert torch.equal(logits(qpissa, tokens), logits_disabled(qpissa, tokens))
    plain = load(folder, torch.float32)
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = pissa.ops.dequantize(pissa.ops.quantize(module.weight))
    assert (logits(qpissa, tokens) - base).norm() < (logits(plain, tokens) - base).norm()


def logits_disabled(model: pissa.PissaModel, tokens: Tensor) -> Tensor:
    with model.disable_adapter():
        return logits(model, tokens)


def turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


PRICES = [(apples, price) for apples in range(2, 6) for price in range(2, 6)]
QUESTIONS = [turn("user", f"{apples} apples at {price} dollars each: how much?") for apples, price in PRICES]
ANSWERS = [turn("assistant", f"{apples} x {price} = {apples * price} dollars") for apples, price in PRICES]
WRONG = [turn("assistant", f"{apples} + {price} = {apples + price} dollars") for apples, price in PRICES]


@forms
@quiet
def test_fine_tuning_and_then_preferences(form: str, folder: Path, tokens: Tensor, tmp_path: Path) -> None:
    """The second stage starts from the first one's folder, and its reference is what the first stage has learnt."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    few: dict[str, Any] = {"max_steps": 3, "save_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 2e-4}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = pissa.wrap(load(folder, torch.float32), r=16, task_type="CAUSAL_LM", **FORMS[form])
    data = Dataset.from_list([{"prompt": q, "completion": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)])
    first = SFTTrainer(
        model, SFTConfig(**options(tmp_path / "sft", **few)), train_dataset=data, processing_class=tokenizer
    )
    with unchanged(model):
        first.train()
    assert logged(first)[-1] < logged(first)[0]

    model = pissa.PissaModel.from_pretrained(
        load(folder, torch.float32), tmp_path / "sft" / "checkpoint-3", is_trainable=True
    )
    rows = [{"prompt": q, "chosen": c, "rejected": r} for q, c, r in zip(QUESTIONS, ANSWERS, WRONG, strict=True)]
    second = DPOTrainer(
        model,
        args=DPOConfig(**options(tmp_path / "dpo", **few)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    with unchanged(model):
        second.train()
    assert logged(second)[0] == torch.tensor(2.0).log().item()
    assert logged(second)[-1] < logged(second)[0]

    again = pissa.PissaModel.from_pretrained(load(folder, torch.float32), tmp_path / "dpo" / "checkpoint-3")
    trained = second.accelerator.unwrap_model(second.model, keep_fp32_wrapper=False).eval()
    assert torch.equal(logits(again, tokens), logits(trained, tokens))
