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

import language_models
import mixtures
import pissa
from language_models import Make, assert_equal, assert_same, logits, snapshot, train
from oracle import change_all
from pissa import PissaConfig
from tiny_model import save_tiny_model

FORMS: dict[str, dict[str, Any]] = {
    **language_models.FORMS,
    "dora": {"use_dora": True},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "rslora": {"use_rslora": True, "lora_alpha": 3, "rank_pattern": {"q_proj": 2}},
}
pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")


def trained(make: Make, tokens: Tensor, form: str) -> pissa.PissaModel:
    model = pissa.wrap(make(), **{"r": 4, **FORMS[form]})
    train(model, tokens)
    return model


def in_file(folder: Path) -> dict[str, Tensor]:
    return peft.utils.load_peft_weights(str(folder), device="cpu")


@pytest.mark.parametrize("form", FORMS)
def test_the_state_dict_is_the_plain_lora_and_comes_back(
    form: str, small_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    """The one that is written to disk; what plain PEFT makes of that is tested with the files."""
    model = trained(small_llama, tokens, form)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    expected = in_file(tmp_path)
    assert_equal(peft.get_peft_model_state_dict(model, save_embedding_layers=False), expected)
    raw = model.state_dict()
    assert_equal(peft.get_peft_model_state_dict(model, state_dict=raw, save_embedding_layers=False), expected)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert len(expected[name]) == 2 * model.base_model.model.model.layers[0].self_attn.q_proj.r["default"]
    output = logits(model, tokens)
    train(model, tokens)
    assert not torch.equal(logits(model, tokens), output)
    assert not peft.set_peft_model_state_dict(model, expected).unexpected_keys
    assert torch.equal(logits(model, tokens), output)


def test_the_state_dict_of_fused_experts_has_pefts_layout(tmp_path: Path) -> None:
    model = pissa.wrap(mixtures.make("mixtral"), r=2)
    change_all(model)
    model.save_pretrained(tmp_path)
    assert_equal(peft.get_peft_model_state_dict(model), in_file(tmp_path))


def test_the_state_dict_holds_one_adapter_its_biases_and_no_more(small_llama: Make, tokens: Tensor) -> None:
    model = pissa.wrap(small_llama(attention_bias=True), r=4, target_modules=["q_proj"], bias="lora_only")
    model.add_adapter("other", PissaConfig(r=2, target_modules=["v_proj"]))
    train(model, tokens)
    keys = {name.rpartition("self_attn.")[2] for name in peft.get_peft_model_state_dict(model)}
    biases = {"q_proj.base_layer.bias", "v_proj.base_layer.bias"}  # PEFT's "lora_only": of every layer with an adapter
    assert keys == {"q_proj.lora_A.weight", "q_proj.lora_B.weight", *biases}
    other = peft.get_peft_model_state_dict(model, adapter_name="other")
    assert {name.rpartition("self_attn.")[2] for name in other} == {"v_proj.lora_A.weight", "v_proj.lora_B.weight"}


def test_layers_that_a_state_dict_lacks_are_left_out(small_llama: Make) -> None:
    """As in PEFT, which filters the state dict that it is given. Nothing raw takes their place."""
    model = pissa.wrap(small_llama(), r=4, target_modules=["q_proj"])
    part = {name: value for name, value in model.state_dict().items() if ".layers.0." in name or "start" in name}
    found = peft.get_peft_model_state_dict(model, state_dict=part)
    assert len(found) == 2
    assert all(".layers.0." in name for name in found)


@pytest.mark.parametrize("form", ["implicit", "nf4"])
def test_hotswapping_is_refused_before_anything_is_touched(
    form: str, small_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    """PEFT would copy A and B over dA and dB, and zero what the folder does not name, a stored base among it."""
    model = trained(small_llama, tokens, form)
    model.save_pretrained(tmp_path)
    before = snapshot(model)
    with pytest.raises(ValueError, match="Incompatible PEFT types found: PISSA and LORA"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    assert_same(model, before)


def test_the_init_of_copies_cannot_be_asked_for(small_llama: Make) -> None:
    with pytest.raises(ValueError, match=r"init='given' marks an adapter whose factors came from elsewhere"):
        pissa.wrap(small_llama(), r=2, init="given")


def test_the_dense_base_has_its_state_dict(small_llama: Make) -> None:
    base = small_llama()
    expected = {name: value.clone() for name, value in base.state_dict().items()}
    assert_equal(peft.get_base_model_state_dict(pissa.wrap(base, r=4)), expected)


@pytest.mark.parametrize("form", ["explicit", "nf4"])
def test_residuals_do_not_pass_for_the_base(form: str, small_llama: Make, tokens: Tensor) -> None:
    model = trained(small_llama, tokens, form)
    for ask in (peft.get_base_model_state_dict, lambda model: peft.set_base_model_state_dict(model, {})):
        with pytest.raises(ValueError, match=rf"q_proj.*keeps a residual stored as {form}.*model\.unload\(\)"):
            ask(model)
    with model.disable_adapter():
        expected = logits(model, tokens)
    base = model.unload()
    again = small_llama(seed=1)
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


def plain_lora(base: torch.nn.Module, tokens: Tensor, **fields: Any) -> peft.PeftModel:
    lora = peft.LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": "all-linear", **fields})
    model = peft.get_peft_model(base, lora)
    train(model, tokens)
    return model.eval()


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"target_modules": ["embed_tokens", "q_proj"]}])
def test_a_plain_lora_of_the_same_rank_is_taken_for_what_it_is(
    fields: dict[str, Any], small_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    plain = plain_lora(small_llama(), tokens, **fields)
    state, expected = peft.get_peft_model_state_dict(plain, save_embedding_layers=False), logits(plain, tokens)
    model = pissa.wrap(small_llama(), r=4, **fields)
    model.add_adapter("other", PissaConfig(r=4, **fields))
    train(model, tokens)
    assert not peft.set_peft_model_state_dict(model, state).unexpected_keys
    bound = 1e-4 * expected.abs().max()  # the two sum the change in another order
    assert (logits(model, tokens) - expected).abs().max() < bound
    # An adapter that is added later starts where it should, and files keep what it was.
    model.add_adapter("later", PissaConfig(r=4, **fields))
    assert model.base_model.model.model.layers[0].self_attn.q_proj.start_of("later").a0.any()
    model.save_pretrained(tmp_path, selected_adapters=["default"], save_embedding_layers=False)
    again = pissa.PissaModel.from_pretrained(small_llama(), tmp_path, is_trainable=True)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    again.add_adapter("later", PissaConfig(r=4, **fields))
    assert again.base_model.model.model.layers[0].self_attn.q_proj.start_of("later").a0.any()
    losses = train(again, tokens)
    assert losses[-1] < losses[0]


def test_a_plain_lora_of_fused_experts_is_taken() -> None:
    first, second = (pissa.wrap(mixtures.make("mixtral"), r=2) for _ in range(2))
    change_all(first)
    state = peft.get_peft_model_state_dict(first)
    peft.set_peft_model_state_dict(second, state)
    assert_equal(peft.get_peft_model_state_dict(second), state)


DAMAGE: dict[str, tuple[Any, str]] = {
    "a factor is missing": (lambda state, key: state.pop(key), r"lora_A\.weight is missing; needed: \[8, 64\]\."),
    "another rank": (lambda state, key: state.update({key: state[key][:3]}), r"lora_A\.weight is \[3, 64\]; needed"),
    "another start": (lambda state, key: state[key].add_(1), r"not \[A ; dA\] and \[dB \| B0\]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_another_state_dict_is_refused_before_anything_is_touched(
    damage: str, small_llama: Make, tokens: Tensor
) -> None:
    model = trained(small_llama, tokens, "implicit")
    state = peft.get_peft_model_state_dict(model)
    change, message = DAMAGE[damage]
    change(state, "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        peft.set_peft_model_state_dict(model, state)
    assert_same(model, before)
    assert model.peft_config["default"].init == "pissa"


@pytest.mark.parametrize("own", [True, False])
def test_factors_beside_a_tensor_of_another_shape_change_nothing(own: bool, small_llama: Make, tokens: Tensor) -> None:
    """torch loads what fits before it raises. A plain LoRA, which is not the adapter's own, would take its start."""
    fields: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = pissa.wrap(small_llama(), r=4, **fields)
    state = peft.get_peft_model_state_dict(model if own else plain_lora(small_llama(), tokens, **fields))
    train(model, tokens)
    before, config = snapshot(model), model.peft_config["default"].to_dict()
    head = "base_model.model.lm_head.weight"
    with pytest.raises(RuntimeError, match=r"size mismatch for base_model\.model\.lm_head"):
        peft.set_peft_model_state_dict(model, state | {head: state[head][1:]})
    assert_same(model, before)
    assert model.peft_config["default"].to_dict() == config
    assert not peft.set_peft_model_state_dict(model, state).unexpected_keys
