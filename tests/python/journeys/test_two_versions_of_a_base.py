"""An adapter continues the function that was trained: on another version of its base it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import pissa
from checkpoint_folders import change_tensors, save
from language_models import assert_same, logits, snapshot, train

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")

CHANGED = {
    "a norm": "model.norm.weight",
    "the embedding": "model.embed_tokens.weight",
    "a bias of an adapted layer": "model.layers.1.self_attn.k_proj.bias",
}


@pytest.fixture(params=[None, "nf4"], ids=["dense", "nf4"])
def trained(request: pytest.FixtureRequest, tokens: Tensor, tmp_path: Path) -> Tensor:
    """Writes a base, and an adapter that was trained on it, to folders of these names; the model's logits."""
    save("qwen2", tmp_path / "base")
    model = pissa.wrap(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), r=4, quant=request.param)
    train(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    return logits(model.eval(), tokens)


def test_the_same_base_is_accepted(trained: Tensor, tokens: Tensor, tmp_path: Path) -> None:
    save("qwen2", tmp_path / "again", shards="20KB")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(pissa.PissaModel.from_pretrained(base, tmp_path / "adapter"), tokens), trained)
    assert torch.equal(logits(pissa.load(tmp_path / "again", adapter=tmp_path / "adapter").eval(), tokens), trained)


@pytest.mark.parametrize("tensor", CHANGED.values(), ids=CHANGED)
def test_another_version_is_refused(tensor: str, trained: Tensor, tmp_path: Path) -> None:
    save("qwen2", tmp_path / "other")
    change_tensors(tmp_path / "other", lambda tensors: tensors | {tensor: 1.25 * tensors[tensor]})
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"not the base|other values|another base|was trained on"):
        pissa.PissaModel.from_pretrained(base, tmp_path / "adapter")
    assert_same(base, before)
    with pytest.raises(ValueError, match=r"not the base|other values|another base|was trained on"):
        pissa.load(tmp_path / "other", adapter=tmp_path / "adapter")
