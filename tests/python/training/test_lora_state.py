"""The plain LoRA in memory: plain PEFT makes the trained function of it, on the base that an engine serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import mixtures
import pissa
from language_models import Make, error, logits, train
from oracle import change_all
from pissa import PissaConfig, PissaModel, notices
from pissa.layers.layer import pissa_layers
from pissa.training import lora_state

BOUND = 2**-24 * 1000
"""Relative: sums of up to 700 terms in another order, and a rounding of each factor."""


def served(base: nn.Module, model: PissaModel, name: str | None = None, of: Any = "original") -> nn.Module:
    """The plain LoRA of `model` by PEFT on the base of an engine, which knows only tensors and their configuration."""
    tensors, config = pissa.lora_state_dict(model, name, of), pissa.lora_config(model, name, of)
    assert type(config) is peft.LoraConfig
    lora = peft.get_peft_model(base, config)
    result = peft.set_peft_model_state_dict(lora, tensors)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    return lora.eval()


def with_residuals(base: nn.Module, model: PissaModel) -> nn.Module:
    """`base` with the residuals of `model` in the place of weights, as an engine serves the stored base."""
    for name, layer in pissa_layers(model.base_model.model).items():
        if layer.base.start is not None:
            base.get_submodule(name).weight.data.copy_(layer.base.module.dense_residual())
    return base


REWARDS: dict[str, Any] = {"init": "lora", "use_rslora": True, "lora_alpha": 16}
DENSE: dict[str, dict[str, Any]] = {
    "dense": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3, "rank_pattern": {"q_proj": 2}},
    "lora": {"init": "lora"},
    "rewards": REWARDS,
    "dora": {"use_dora": True},
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1, 5]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("case", DENSE)
def test_on_the_original_model(case: str, tiny_llama: Make, tokens: Tensor) -> None:
    model = pissa.wrap(tiny_llama(), **{"r": 4, "task_type": "CAUSAL_LM", **DENSE[case]})
    start = logits(model.eval(), tokens)
    train(model, tokens)
    trained = logits(model, tokens)
    assert error(logits(served(tiny_llama(), model), tokens), trained) < BOUND < 0.1 * error(start, trained)
    assert pissa.lora_config(model).r == (4 if case in ("lora", "rewards") else 8)


def test_it_is_what_peft_hands_out(tiny_llama: Make, tokens: Tensor) -> None:
    model = pissa.wrap(tiny_llama(), r=4)
    train(model, tokens)
    expected, found = peft.get_peft_model_state_dict(model), pissa.lora_state_dict(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    train(model, tokens, steps=1)  # the tensors are copies
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("fields", [{}, REWARDS])
def test_fused_experts(fields: dict[str, Any]) -> None:
    model = pissa.wrap(mixtures.make("mixtral"), r=2, **fields)
    change_all(model)
    ids = torch.arange(12).view(2, 6)
    lora = served(mixtures.make("mixtral"), model)
    assert error(logits(lora, ids), logits(model.eval(), ids)) < BOUND


STORED: dict[str, tuple[dict[str, Any], int]] = {
    "nf4": ({"quant": "nf4"}, 4),
    "int8": ({"quant": "int8"}, 4),
    "explicit": ({"residual": "explicit"}, 4),
    "alternations": ({"quant": "nf4", "quant_iters": 2}, 4),
    "rewards": ({"quant": "nf4", **REWARDS}, 4),
    "lora on the repaired base": ({"quant": "nf4", "repair": "pissa", **REWARDS}, 8),
    "dora": ({"quant": "nf4", "use_dora": True}, 4),
}


@pytest.mark.parametrize("case", STORED)
def test_on_the_residual(case: str, tiny_llama: Make, tokens: Tensor) -> None:
    fields, rank = STORED[case]
    model = pissa.wrap(tiny_llama(), r=4, task_type="CAUSAL_LM", **fields)
    start = logits(model.eval(), tokens)
    train(model, tokens)
    trained = logits(model, tokens)
    lora = served(with_residuals(tiny_llama(), model), model, of="residual")
    assert error(logits(lora, tokens), trained) < BOUND < 0.1 * error(start, trained)
    config = pissa.lora_config(model, base="residual")
    assert config.r == rank
    found = pissa.lora_state_dict(model, base="residual")
    assert {len(tensor) for key, tensor in found.items() if "lora_A" in key} == {rank}


@pytest.mark.filterwarnings("ignore::pissa.notices.TiedWeightWarning", "ignore:Model has `tie_word_embeddings=True`")
def test_a_dense_layer_beside_residuals(tiny_llama: Make, tokens: Tensor) -> None:
    """It needs rank 2r, and the others are padded to that."""
    model = pissa.wrap(tiny_llama(tie_word_embeddings=True), r=4, quant="nf4", target_modules=["q_proj", "lm_head"])
    train(model, tokens)
    lora = served(with_residuals(tiny_llama(tie_word_embeddings=True), model), model, of="residual")
    assert error(logits(lora, tokens), logits(model.eval(), tokens)) < BOUND
    assert pissa.lora_config(model, base="residual").r == 8


def test_on_the_original_model_a_stored_base_is_inexact_and_says_so_once(tiny_llama: Make, tokens: Tensor) -> None:
    model = pissa.wrap(tiny_llama(), r=4, quant="nf4")
    train(model, tokens)
    with pytest.warns(notices.InexactLoraWarning, match="residual of the base is stored as nf4"):
        pissa.lora_state_dict(model)
    pissa.lora_state_dict(model)
    pissa.lora_state_dict(model, base="residual")


def test_what_the_residual_lacks_decides_the_rank(tiny_llama: Make) -> None:
    """It lacks nothing for LoRA's start; and another start than the adapter's, whose scale has been changed since."""
    model = pissa.wrap(tiny_llama(), r=4, quant="nf4", init="lora")
    model.add_adapter("other", PissaConfig(r=4))
    assert pissa.lora_config(model, "other", "residual").r == 8
    model = pissa.wrap(tiny_llama(), r=4, quant="nf4")
    for layer in pissa_layers(model.base_model.model).values():
        layer.set_scale("default", 2)
    with pytest.raises(ValueError, match=r"of adapter 'default', of rank 4; both together have rank 12, .* 8 is"):
        pissa.lora_config(model, base="residual")


def test_an_adapter_beside_another(tiny_llama: Make, tokens: Tensor) -> None:
    model = pissa.wrap(tiny_llama(), r=4, quant="nf4")
    model.add_adapter("plain", PissaConfig(r=4, init="lora", lora_alpha=8))
    model.add_adapter("small", PissaConfig(r=2))
    model.add_adapter("scaled", PissaConfig(r=4, lora_alpha=8))
    model.set_adapter("plain")
    train(model, tokens)
    trained = logits(model.eval(), tokens)
    base = with_residuals(tiny_llama(), model)
    assert error(logits(served(base, model, of="residual"), tokens), trained) < BOUND  # the active one
    with pytest.raises(ValueError, match=r"of adapter 'small', of rank 4; both together have rank 8, .* 4 is"):
        pissa.lora_state_dict(model, "small", base="residual")
    with pytest.raises(ValueError, match=r"of adapter 'scaled', of rank 4; both together have rank 12, .* 8 is"):
        pissa.lora_state_dict(model, "scaled", base="residual")
    with pytest.raises(ValueError, match="adapter_name: got 'other'; allowed: 'default', 'plain', 'small', 'scaled'"):
        pissa.lora_state_dict(model, "other")
    model.base_model.set_adapter(["default", "plain"])
    with pytest.raises(ValueError, match="several adapters are active; give one of 'default', 'plain'"):
        pissa.lora_config(model)


@pytest.mark.parametrize("ask", [pissa.lora_state_dict, pissa.lora_config])
def test_refused(ask: Callable[..., object], tiny_llama: Make) -> None:
    base = tiny_llama()
    with pytest.raises(TypeError, match=r"must be a pissa\.PissaModel, got LlamaForCausalLM; accelerator"):
        ask(base)
    model = pissa.wrap(base, r=2)
    with pytest.raises(ValueError, match="base: got 'q'; allowed: 'original', 'residual'"):
        ask(model, base="q")
    with pytest.raises(ValueError, match='got "residual", but the base is not stored'):
        ask(model, base="residual")


def test_what_deepspeed_has_partitioned_is_refused_with_the_way_to_gather_it(tiny_llama: Make) -> None:
    model = pissa.wrap(tiny_llama(), r=2)
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape, parameter.data = number, parameter.shape, torch.empty(0)
    with pytest.raises(ValueError, match=r"lora_.*default.* is partitioned by DeepSpeed.*GatheredParameters"):
        pissa.lora_state_dict(model)


def test_no_frozen_shard_is_gathered(tiny_llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pissa.wrap(tiny_llama(), r=2, adapter_name="q", target_modules=["v_proj"])  # q_proj begins with its name
    gathered = []
    monkeypatch.setattr(lora_state, "is_sharded", lambda value: True)
    monkeypatch.setattr(lora_state, "whole_tensor", lambda value: gathered.append(value) or value)
    pissa.lora_state_dict(model)
    assert gathered
    assert not {id(value) for value in gathered} & {
        id(value) for value in model.parameters() if not value.requires_grad
    }


def test_the_state_dict_of_a_part_of_the_model_is_refused_by_peft(tiny_llama: Make) -> None:
    """verl asks for it block by block. Its names are other ones, and nothing of the adapter would be handed out."""
    model = pissa.wrap(tiny_llama(), r=2)
    part = model.base_model.model.model.layers[0].state_dict()
    with pytest.raises(ValueError, match=r"has self_attn\.q_proj\.lora_A\.default\.weight, .* pissa\.lora_state_dict"):
        peft.get_peft_model_state_dict(model, state_dict=part)
