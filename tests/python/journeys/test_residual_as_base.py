"""The residuals that `pissa init` writes lack their principal part: nothing takes them for an unmodified model."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor
from transformers import AutoModelForCausalLM

import pissa
from hub_cache import HubCache
from language_models import assert_same, error, logits, snapshot
from lora_files import CLOSE
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
