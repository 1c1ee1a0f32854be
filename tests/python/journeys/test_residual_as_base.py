"""The residuals that `pissa init` writes lack their principal part: nothing takes them for an unmodified model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

import pissa
from hub_cache import HubCache
from language_models import assert_same, error, logits, snapshot
from lora_files import CLOSE
from peft_adapters import train_on_residual
from pissa.checkpoints.init import init
from pissa.checkpoints.merge import merge
from runs import refused

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")


def test_a_model_in_memory(base: Path, tokens: Tensor, tmp_path: Path) -> None:
    init(base, tmp_path / "split", pissa.PissaConfig(r=4))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "split")
    before = snapshot(model)
    advice = r"(?s)(?=.*residual).*pissa\.load"
    with pytest.raises(ValueError, match=advice):
        pissa.wrap(model, r=4)
    with pytest.raises(ValueError, match=advice):
        pissa.calibrate(model, [tokens], quant="nf4")
    assert_same(model, before)


def test_a_model_in_memory_that_peft_has_split(tiny_llama: Any, tokens: Tensor, tmp_path: Path) -> None:
    trained = train_on_residual(tiny_llama, tokens, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(trained.initial)
    with pytest.raises(ValueError, match=r"is a residual, whose initial adapter is in pissa_init; .*subfolder='pissa"):
        pissa.wrap(model, r=4)
    merged = PeftModel.from_pretrained(model, trained.initial, subfolder="pissa_init").merge_and_unload()
    merged.name_or_path = "org/model"
    assert error(logits(pissa.wrap(merged, r=4), tokens), logits(tiny_llama(), tokens)) < CLOSE


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("by_name", [False, True])
def test_the_commands(
    quant: str | None,
    by_name: bool,
    base: Path,
    hub: HubCache,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    init(base, tmp_path / "split", pissa.PissaConfig(r=4, quant=quant))
    model = hub.put("org/split", tmp_path / "split") if by_name else str(tmp_path / "split")
    out = tmp_path / "out"
    message = refused(["init", model, str(out), "--rank", "4"], capsys)
    assert "residual" in message
    assert model in message
    assert "pissa.load" in message or "that was split" in message
    assert not out.exists()


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_what_an_adapter_was_merged_into_is_a_base_again(
    quant: str | None, base: Path, tokens: Tensor, tmp_path: Path
) -> None:
    init(base, tmp_path / "split", pissa.PissaConfig(r=4, quant=quant))
    pissa.load(tmp_path / "split").save_pretrained(tmp_path / "run")
    merge(tmp_path / "run", tmp_path / "split", tmp_path / "merged")
    expected = logits(AutoModelForCausalLM.from_pretrained(base if quant is None else tmp_path / "merged"), tokens)
    model = pissa.wrap(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), r=4)
    assert error(logits(model, tokens), expected) < CLOSE
    init(tmp_path / "merged", tmp_path / "again", pissa.PissaConfig(r=4))
    assert error(logits(pissa.load(tmp_path / "again"), tokens), expected) < CLOSE
