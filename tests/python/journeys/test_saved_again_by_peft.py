"""An adapter with LoRA's start is a LoRA like any other: PEFT loads it, trains it, and saves over it."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

import pissa
from language_models import error, logits, train
from lora_files import CLOSE
from peft_adapters import plain_logits
from pissa.cli import main


@pytest.fixture
def saved(base: Path, tokens: Tensor, tmp_path: Path) -> Tensor:
    """Writes an adapter of ours to the folder "run"; the model's logits."""
    model = pissa.wrap(AutoModelForCausalLM.from_pretrained(base), r=16, init="lora")
    train(model, tokens)
    model.save_pretrained(tmp_path / "run")
    return logits(model.eval(), tokens)


def test_what_peft_saves_over_it_is_the_adapter(saved: Tensor, base: Path, tokens: Tensor, tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run, is_trainable=True)
    train(model, tokens)
    model.save_pretrained(run)
    expected = logits(model.eval(), tokens)
    assert error(expected, saved) > 100 * CLOSE
    for name, command in {"vllm": ["export", "--to", "vllm"], "lora": ["convert", "--rank", "16"]}.items():
        assert main([*command, str(run), str(tmp_path / name)]) == 0
        unmodified = AutoModelForCausalLM.from_pretrained(base)
        assert error(plain_logits(unmodified, tmp_path / name, tokens), expected) < CLOSE, name
    assert main(["merge", str(run), str(tmp_path / "merged"), "--base", str(base)]) == 0
    assert error(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tokens), expected) < CLOSE
    with pytest.raises(ValueError, match=r"(?i)peft"):  # never what it was before
        pissa.PissaModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run)
