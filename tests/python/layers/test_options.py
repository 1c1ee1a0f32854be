"""Fields of LoraConfig: each does what it does in PEFT, in the function, its gradients and the files."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import architecture_checks as checks
import pissa
from architectures import ARCHITECTURES, Architecture
from daily import each
from oracle import change_all
from pissa.layers.layer import pissa_layers

ADAPTER = checks.ADAPTER
TIED = {"target_modules": ["lm_head", "q_proj"]}

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "rank_pattern": ("llama3", {"rank_pattern": {"q_proj": 7, r"model\.layers\.1\.mlp\.up_proj": 2}}),
    "alpha_pattern": ("llama3", {"lora_alpha": 6, "alpha_pattern": {"k_proj": 3}}),
    "rank_pattern and alpha_pattern of experts": (
        "mixtral",
        {"rank_pattern": {"gate_up_proj": 2, "q_proj": 7}, "alpha_pattern": {"down_proj": 9}},
    ),
    "use_rslora": ("llama3", {"use_rslora": True, "lora_alpha": 6, "rank_pattern": {"q_proj": 7}}),
    "exclude_modules": ("llama3", {"exclude_modules": ["q_proj", "up_proj"]}),
    "layers_to_transform": ("llama3", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    "a pattern": ("llama3", {"target_modules": r".*layers\.0\..*(q|v)_proj"}),
    "modules_to_save": ("llama3", {"modules_to_save": ["lm_head"]}),
    "bias of all": ("qwen2", {"target_modules": ["q_proj", "up_proj"], "bias": "all"}),
    "bias of adapted layers": ("qwen2", {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}),
    "tied head": ("tied", TIED),
    "tied embeddings": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied, both": ("tied", {"target_modules": ["embed_tokens", "lm_head"]}),
}
pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")
DAILY = ("rank_pattern and alpha_pattern of experts", "use_rslora", "modules_to_save", "bias of adapted layers")
DAILY += ("tied head", "tied, both")
"""The others are told from these by their targets, sizes and scalings alone, or by what is trained: tests below."""


def architecture(option: str) -> Architecture:
    name, fields = OPTIONS[option]
    tied = dataclasses.replace(ARCHITECTURES["gemma"], fields={})  # its embeddings are tied, and scaled
    return dataclasses.replace(tied if name == "tied" else ARCHITECTURES[name], fields=fields)


def adapted(option: str, **fields: Any) -> tuple[pissa.PissaModel, dict[str, pissa.layers.layer.PissaLayer]]:
    model = checks.wrapped(architecture(option), fields)
    return model, pissa_layers(model.base_model.model, ADAPTER)


@pytest.mark.parametrize("option", each(OPTIONS, DAILY))
def test_its_life(option: str, tmp_path: Path, subtests: pytest.Subtests) -> None:
    life = checks.Life(architecture(option), {}, tmp_path)
    for check in checks.LIFE[: -1 if "bias" in option else None]:  # trained biases are the base's own, and stay
        with subtests.test(check.__name__):
            check(life)
    plain = checks.output(peft.PeftModel.from_pretrained(architecture(option).make(), tmp_path), life.batch)
    checks.assert_as_accurate(plain, life.plain.logits, life.exact.logits, "logits in plain PEFT")


def test_ranks_and_scalings() -> None:
    """The rank in the parameters and in the start; lora_alpha follows it unless given."""
    root = math.sqrt
    for option, others, particular in (
        ("rank_pattern", (4, 1.0), {"q_proj": (7, 1.0), "model.layers.1.mlp.up_proj": (2, 1.0)}),
        ("alpha_pattern", (4, 6 / 4), {"k_proj": (4, 3 / 4)}),
        ("use_rslora", (4, 6 / root(4)), {"q_proj": (7, 6 / root(7))}),
    ):
        _, layers = adapted(option)
        assert len(layers) == 14
        for name, layer in layers.items():
            rank, scaling = next((found for end, found in particular.items() if name.endswith(end)), others)
            assert len(layer.lora_A[ADAPTER].weight) == len(layer.start_of(ADAPTER).a0) == rank, name
            assert layer.scaling[ADAPTER] == scaling, name


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("exclude_modules", {f"layers.{i}.{name}_proj" for i in (0, 1) for name in ("k", "v", "o", "gate", "down")}),
        ("layers_to_transform", {"layers.1.q_proj", "layers.1.v_proj"}),
        ("a pattern", {"layers.0.q_proj", "layers.0.v_proj"}),
    ],
)
def test_only_what_is_targeted_is_adapted(option: str, names: set[str]) -> None:
    model, layers = adapted(option)
    short = {name.replace("model.", "").replace("self_attn.", "").replace("mlp.", "") for name in layers}
    assert short == names
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * len(names)


@pytest.mark.parametrize("form", [{}, {"quant": "nf4"}])
@pytest.mark.parametrize(
    ("option", "trained"),
    [("bias of all", {"q_proj", "k_proj", "v_proj"}), ("bias of adapted layers", {"q_proj"})],
)
def test_biases_are_trained(option: str, trained: set[str], form: dict[str, str], tmp_path: Path) -> None:
    model, _ = adapted(option, **form)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}
    assert len(before) == 6
    checks.step(model, architecture(option).batch())
    changed = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert {name.replace(".base_layer", "").split(".")[-2] for name in changed} == trained
    assert len(changed) == 2 * len(trained)


@pytest.mark.parametrize("option", ["tied head", "tied embeddings", "tied, both"])
def test_tied_weights_stay_tied(option: str) -> None:
    fresh = architecture(option).make()
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
    model, layers = adapted(option)
    batch = architecture(option).batch()
    base = model.base_model.model

    def weight(module: nn.Module) -> torch.Tensor:
        return getattr(module, "base_layer", module).weight

    assert weight(base.lm_head) is weight(base.model.embed_tokens)
    checks.step(model, batch)
    assert all(layer.deltas(ADAPTER)[1].any() for layer in layers.values())
    assert weight(base.lm_head) is weight(base.model.embed_tokens)
    assert torch.equal(weight(base.lm_head), fresh.lm_head.weight)
    unloaded = model.unload()
    assert unloaded.lm_head.weight is unloaded.model.embed_tokens.weight


@pytest.mark.parametrize("option", ["tied head", "tied embeddings", "tied, both"])
def test_a_merged_model_of_tied_weights_is_saved_as_it_is(option: str, tmp_path: Path) -> None:
    model, _ = adapted(option)
    change_all(model)
    batch = architecture(option).batch()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    assert torch.equal(checks.output(again, batch), checks.output(merged, batch))
