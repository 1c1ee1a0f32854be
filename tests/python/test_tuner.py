"""What PEFT's functions hand out of a PissaModel is right under the names that it has, or is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor
from transformers import pipeline

import mixtures
import pissa
from language_models import Make, assert_same, logits, snapshot, train
from pissa import PissaConfig
from tiny_model import save_tiny_model

FORMS: dict[str, dict[str, Any]] = {
    "implicit": {},
    "explicit": {"residual": "explicit"},
    "nf4": {"quant": "nf4"},
    "dora": {"use_dora": True},
    "adalora": {"use_adalora": True},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "rslora": {"use_rslora": True, "lora_alpha": 3, "rank_pattern": {"q_proj": 2}},
}
pytestmark = pytest.mark.filterwarnings("ignore:The residual of the base is stored as:UserWarning")


def trained(make: Make, tokens: Tensor, form: str) -> pissa.PissaModel:
    model = pissa.wrap(make(), **{"r": 4, **FORMS[form]})
    train(model, tokens)
    return model


def in_file(folder: Path) -> dict[str, Tensor]:
    return peft.utils.load_peft_weights(str(folder), device="cpu")


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name].cpu(), tensor), name


@pytest.mark.parametrize("form", FORMS)
def test_the_state_dict_is_the_plain_lora(form: str, tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    """The one that is written to disk; what plain PEFT makes of that is tested with the files."""
    model = trained(tiny_llama, tokens, form)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    expected = in_file(tmp_path)
    assert_equal(peft.get_peft_model_state_dict(model, save_embedding_layers=False), expected)
    raw = model.state_dict()
    assert_equal(peft.get_peft_model_state_dict(model, state_dict=raw, save_embedding_layers=False), expected)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert len(expected[name]) == 2 * model.base_model.model.model.layers[0].self_attn.q_proj.r["default"]


def test_the_state_dict_of_fused_experts_has_pefts_layout(tmp_path: Path) -> None:
    model = pissa.wrap(mixtures.make("mixtral"), r=2)
    mixtures.change_all(model)
    model.save_pretrained(tmp_path)
    assert_equal(peft.get_peft_model_state_dict(model), in_file(tmp_path))


def test_the_state_dict_holds_one_adapter_its_biases_and_no_more(tiny_llama: Make, tokens: Tensor) -> None:
    model = pissa.wrap(tiny_llama(attention_bias=True), r=4, target_modules=["q_proj"], bias="lora_only")
    model.add_adapter("other", PissaConfig(r=2, target_modules=["v_proj"]))
    train(model, tokens)
    keys = {name.rpartition("self_attn.")[2] for name in peft.get_peft_model_state_dict(model)}
    biases = {"q_proj.base_layer.bias", "v_proj.base_layer.bias"}  # PEFT's "lora_only": of every layer with an adapter
    assert keys == {"q_proj.lora_A.weight", "q_proj.lora_B.weight", *biases}
    other = peft.get_peft_model_state_dict(model, adapter_name="other")
    assert {name.rpartition("self_attn.")[2] for name in other} == {"v_proj.lora_A.weight", "v_proj.lora_B.weight"}


def test_layers_that_a_state_dict_lacks_are_left_out(tiny_llama: Make) -> None:
    """As in PEFT, which filters the state dict that it is given. Nothing raw takes their place."""
    model = pissa.wrap(tiny_llama(), r=4, target_modules=["q_proj"])
    part = {name: value for name, value in model.state_dict().items() if ".layers.0." in name or "start" in name}
    found = peft.get_peft_model_state_dict(model, state_dict=part)
    assert len(found) == 2
    assert all(".layers.0." in name for name in found)


@pytest.mark.parametrize("form", ["implicit", "explicit", "nf4"])
def test_hotswapping_is_refused_before_anything_is_touched(
    form: str, tiny_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    """PEFT would copy A and B over dA and dB, and zero what the folder does not name, a stored base among it."""
    model = trained(tiny_llama, tokens, form)
    model.save_pretrained(tmp_path)
    before = snapshot(model)
    with pytest.raises(ValueError, match="Incompatible PEFT types found: PISSA and LORA"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    assert_same(model, before)


def test_the_dense_base_has_its_state_dict(tiny_llama: Make) -> None:
    base = tiny_llama()
    expected = {name: value.clone() for name, value in base.state_dict().items()}
    assert_equal(peft.get_base_model_state_dict(pissa.wrap(base, r=4)), expected)


@pytest.mark.parametrize("form", ["explicit", "nf4"])
def test_residuals_do_not_pass_for_the_base(form: str, tiny_llama: Make, tokens: Tensor) -> None:
    model = trained(tiny_llama, tokens, form)
    for ask in (peft.get_base_model_state_dict, lambda model: peft.set_base_model_state_dict(model, {})):
        with pytest.raises(ValueError, match=rf"q_proj.*keeps a residual stored as {form}.*model\.unload\(\)"):
            ask(model)
    with model.disable_adapter():
        expected = logits(model, tokens)
    base = model.unload()
    again = tiny_llama(seed=1)
    again.load_state_dict(base.state_dict())
    assert (logits(again, tokens) - expected).abs().max() < 1e-4  # one rounding of the weights to float32
    assert not base._state_dict_pre_hooks


def test_pipelines_know_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_tiny_model(tmp_path)
    model = pissa.wrap(AutoModelForCausalLM.from_pretrained(folder), r=4, task_type="CAUSAL_LM")
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        made = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
    finally:
        logger.removeHandler(caplog.handler)
    assert "not supported" not in caplog.text
    assert made("a", max_new_tokens=2)[0]["generated_text"]
