"""PEFT's LoRA beside our adapters, by its configuration and from its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mixtures
import pissa
from language_models import Make, assert_same, error, logits, snapshot, train
from pissa import PissaConfig, PissaModel

BOUND = 2**-24 * 1000
"""Relative: sums of up to 700 terms in another order."""


def test_a_lora_config_is_an_adapter_with_loras_start(small_llama: Make, tokens: Tensor) -> None:
    model = pissa.wrap(small_llama(), r=4)
    start = logits(model.eval(), tokens)
    lora = peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    model.add_adapter("plain", lora)
    fields = {"r": 3, "lora_alpha": 5, "use_rslora": True, "lora_dropout": 0.1}
    expected = PissaConfig(**fields, target_modules=["q_proj", "v_proj"], init="lora")
    found = model.peft_config["plain"]
    assert (found.init, found.r, found.lora_alpha, found.target_modules) == ("lora", 3, 5, expected.target_modules)
    assert lora == peft.LoraConfig(**fields, target_modules=["q_proj", "v_proj"])  # it was copied
    model.set_adapter("plain")
    assert torch.equal(logits(model.eval(), tokens), start)
    losses = train(model.train(), tokens)
    assert losses[-1] < losses[0]
    model.eval().set_adapter("default")
    assert torch.equal(logits(model, tokens), start)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, 'target_modules: got None, for which PEFT .* names, or "all-linear"'),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "init_lora_weights='pissa' .* with init"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias=True is not supported"),
    ],
)
def test_a_lora_config_that_is_refused(fields: dict[str, Any], words: str, small_llama: Make) -> None:
    model = pissa.wrap(small_llama(), r=2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        model.add_adapter("plain", peft.LoraConfig(**fields))
    assert_same(model, before)


def saved(base: nn.Module, folder: Path, **fields: Any) -> tuple[Path, Callable[[Tensor], Tensor]]:
    """The folder of a plain LoRA, and its logits."""
    lora = peft.get_peft_model(base, peft.LoraConfig(r=4, **fields))
    with torch.no_grad():
        for seed, parameter in enumerate(lora.parameters()):
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(seed)
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    lora.save_pretrained(folder)
    return folder, lambda ids: logits(lora.eval(), ids)


CASES: dict[str, dict[str, Any]] = {
    "two layers": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "another draw": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "a head of its own": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
}


@pytest.mark.parametrize("case", CASES)
def test_a_plain_lora_is_loaded(case: str, small_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    folder, expected = saved(small_llama(), tmp_path / "plain", **CASES[case])
    model = pissa.wrap(small_llama(), r=2)
    start = logits(model.eval(), tokens)
    model.load_adapter(folder, "plain")
    assert torch.equal(logits(model, tokens), start)
    model.set_adapter("plain")
    found = logits(model, tokens)
    assert error(found, expected(tokens)) < BOUND < 0.1 * error(start, expected(tokens))
    assert model.peft_config["plain"].init == "given"

    model.save_pretrained(tmp_path / "ours", selected_adapters=["plain"])
    again = PissaModel.from_pretrained(small_llama(), tmp_path / "ours" / "plain", is_trainable=True).eval()
    assert torch.equal(logits(again, tokens), found)
    losses = train(again, tokens)
    assert losses[-1] < losses[0]


def test_of_fused_experts(tmp_path: Path) -> None:
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    fields = {"target_modules": ["q_proj"], "target_parameters": experts}
    folder, expected = saved(mixtures.make("mixtral"), tmp_path, **fields)
    model = pissa.wrap(mixtures.make("mixtral"), r=2)
    ids = torch.arange(12).view(2, 6)
    model.load_adapter(folder, "plain")
    model.set_adapter("plain")
    assert error(logits(model.eval(), ids), expected(ids)) < BOUND


def test_on_a_stored_base_it_is_a_change_of_that(small_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    model = pissa.wrap(small_llama(), r=4, quant="nf4").eval()
    folder, expected = saved(pissa.wrap(small_llama(), r=4, quant="nf4").unload(), tmp_path, target_modules=["q_proj"])
    model.load_adapter(folder, "plain")
    model.set_adapter("plain")
    assert error(logits(model, tokens), expected(tokens)) < BOUND


def test_a_folder_that_is_refused(small_llama: Make, tmp_path: Path) -> None:
    pissas, _ = saved(small_llama(), tmp_path / "pissa", target_modules=["q_proj"], init_lora_weights="pissa")
    dora, _ = saved(small_llama(), tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    larger, _ = saved(small_llama(), tmp_path / "larger", target_modules=["q_proj"])
    path = larger / "adapter_model.safetensors"
    stray = "base_model.model.model.layers.9.self_attn.q_proj"
    tensors = {f"{stray}.lora_A.weight": torch.zeros(4, 64), f"{stray}.lora_B.weight": torch.zeros(64, 4)}
    save_file(load_file(path) | tensors, path)
    model = pissa.wrap(small_llama(), r=2)
    before = snapshot(model)
    for folder, words in {
        pissas: r"init_lora_weights='pissa', and .* see pissa\.convert",
        dora: "use_dora=True, and such an adapter",
        larger: r"no place for tensor base_model\.model\.model\.layers\.9",
    }.items():
        with pytest.raises(ValueError, match=words):
            model.load_adapter(folder, "plain")
        assert_same(model, dict(before))


def test_embeddings_of_another_base_do_not_replace_the_models(small_llama: Make, tmp_path: Path) -> None:
    folder, _ = saved(small_llama(seed=1), tmp_path, target_modules=["embed_tokens", "q_proj"])
    model = pissa.wrap(small_llama(), r=2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"embed_tokens\.base_layer\.weight is another one than the model's"):
        model.load_adapter(folder, "plain")
    assert_same(model, before)
