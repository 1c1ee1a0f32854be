"""An adapter with LoRA's start is a LoRA like any other: PEFT loads it, trains it, and saves over it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import pissa
from language_models import error, logits, train
from lora_files import CLOSE, config_of
from peft_adapters import plain_logits
from pissa.cli import main


@pytest.fixture
def saved(base: Path, tokens: Tensor, tmp_path: Path) -> Tensor:
    """Writes an adapter of ours to the folder "run"; the model's logits."""
    model = pissa.wrap(AutoModelForCausalLM.from_pretrained(base), r=16, init="lora")
    train(model, tokens)
    model.save_pretrained(tmp_path / "run")
    return logits(model.eval(), tokens)


def test_it_has_the_rank_that_was_trained(saved: Tensor, base: Path, tokens: Tensor, tmp_path: Path) -> None:
    assert config_of(tmp_path / "run")["r"] == 16
    for name, tensor in load_file(tmp_path / "run" / "adapter_model.safetensors").items():
        assert tensor.shape["lora_B" in name] == 16, name
    unmodified = AutoModelForCausalLM.from_pretrained(base)
    assert error(plain_logits(unmodified, tmp_path / "run", tokens), saved) < CLOSE
    again = pissa.PissaModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run")
    assert torch.equal(logits(again, tokens), saved)


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
