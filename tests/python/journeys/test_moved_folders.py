"""Folders that are moved between the steps of a training are the same residuals and the same adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import pissa
from language_models import error, logits, train
from lora_files import CLOSE
from pissa.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")


@pytest.mark.parametrize("quant", [[], ["--quant", "nf4"]], ids=["dense", "nf4"])
def test_each_step_takes_what_the_one_before_left_elsewhere(
    quant: list[str], base: Path, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    assert main(["init", str(base), "split", "--rank", "4", *quant]) == 0
    Path("split").rename(tmp_path / "b" / "residual")
    monkeypatch.chdir(tmp_path)
    model = pissa.load("b/residual")
    train(model, tokens)
    model.save_pretrained("a/run")
    expected = logits(model.eval(), tokens)
    del model  # which maps the residual's files
    (tmp_path / "b" / "residual").rename(tmp_path / "residual")
    (tmp_path / "a" / "run").rename(tmp_path / "b" / "adapter")
    monkeypatch.chdir(tmp_path / "b")
    again = pissa.load("../residual", adapter="adapter", is_trainable=False)
    assert torch.equal(logits(again, tokens), expected)
    for model in ("../residual", str(base)):
        out = tmp_path / f"merged into {Path(model).name}"
        assert main(["merge", "adapter", str(out), "--base", model]) == 0
        assert error(logits(AutoModelForCausalLM.from_pretrained(out), tokens), expected) < CLOSE, model
