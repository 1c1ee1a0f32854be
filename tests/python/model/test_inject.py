"""Decomposition of a model's layers, group by group: every layer its own split, and failures that leave no trace."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import devices
import one_weight
import pissa
from language_models import FORMS, Make, assert_same, snapshot
from pissa.layers.layer import PissaLayer, pissa_layers
from pissa.model import decompose

forms = pytest.mark.parametrize("form", FORMS)


@forms
@pytest.mark.parametrize("elements", [1, 5000, 1 << 22])
def test_layers_start_from_their_own_split_in_groups_of_any_size(
    form: str, elements: int, tiny_llama: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_GROUP", "_GPU_GROUP"):
        monkeypatch.setattr(f"pissa.model.decompose.{name}", elements)
    split_many, groups = pissa.ops.split_many, []

    def watched(weights: list[Tensor], *args: object, **kwargs: object) -> object:
        groups.append([weight.numel() for weight in weights])
        return split_many(weights, *args, **kwargs)

    monkeypatch.setattr(pissa.ops, "split_many", watched)
    base = tiny_llama()
    weights = {name: module.weight for name, module in base.named_modules() if type(module) is nn.Linear}
    fields = {"rank_pattern": {"q_proj": 7, "up_proj": 2}, "alpha_pattern": {"down_proj": 8}, "seed": 5}
    pissa.wrap(base, r=4, **fields, **FORMS[form])
    adapted = pissa_layers(base, "default")
    assert len(adapted) == 14
    limit = elements * (torch.get_num_threads() if devices.on_cpu() else 1)
    assert all(len(group) == 1 or sum(group) <= limit for group in groups)  # what is in memory at once
    assert all(sum(group) + after[0] > limit for group, after in itertools.pairwise(groups))
    for name, layer in adapted.items():
        r, scaling = layer.r["default"], layer.scaling["default"]
        split = one_weight.split(weights[name], r, scaling=scaling, seed=5, form=form)
        assert torch.equal(layer.start_of("default").a0, split.a0)
        assert torch.equal(layer.start_of("default").b0, split.b0)
        if form == "explicit":
            assert torch.equal(layer.base_layer.residual, split.residual)
        elif form == "nf4":
            assert torch.equal(layer.base_layer.residual.codes, split.residual.codes)
            assert torch.equal(layer.base_layer.residual.absmax, split.residual.absmax)


def test_nan_in_a_later_group_restores_the_model(tiny_llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pissa.model.decompose._GROUP", 5000)
    base = tiny_llama(tie_word_embeddings=True)
    base.gradient_checkpointing_enable()  # which adds hooks
    base.model.layers[1].mlp.down_proj.weight.data[3, 5] = math.nan
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"^layer model\.layers\.1\.mlp\.down_proj: weight: contains NaN"):
        pissa.wrap(base, r=4, quant="nf4")
    assert_same(base, before)


@pytest.mark.parametrize(
    ("size", "fields", "words"),
    [
        (3e38, {"init": "lora"}, "layer .*down_proj: weight: the mean of its scales overflows float32"),
        (3e36, {}, "layer .*down_proj: weight: the mean of its scales overflows float32"),
        (1e37, {}, "layer .*down_proj: a0, b0: contain NaN or Inf, or their product overflows"),
    ],
)
def test_residuals_that_cannot_be_restore_the_model(
    size: float, fields: dict[str, Any], words: str, tiny_llama: Make
) -> None:
    base = tiny_llama()
    weight = base.model.layers[1].mlp.down_proj.weight
    weight.data.copy_(size * weight.data.sign())
    before = snapshot(base)
    with pytest.raises(ValueError, match=words):
        pissa.wrap(base, **{"r": 4, "quant": "nf4", **fields})
    assert_same(base, before)


def test_interrupted_decomposition_restores_the_model(tiny_llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pissa.model.decompose._GROUP", 5000)
    base = tiny_llama()
    before = snapshot(base)
    monkeypatch.setattr("pissa.model.decompose.start_with_codes", _interrupted_at(2, decompose.start_with_codes))
    with pytest.raises(KeyboardInterrupt) as caught:
        pissa.wrap(base, r=4, quant="nf4")
    assert not hasattr(caught.value, "__notes__")
    assert_same(base, before)


def test_interrupted_storing_says_how_to_go_on(tiny_llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PissaLayer, "store_base", _interrupted_at(9, PissaLayer.store_base))
    with pytest.raises(KeyboardInterrupt) as caught:
        pissa.wrap(tiny_llama(), r=4, quant="nf4")
    assert caught.value.__notes__[-1].endswith("the adapter is incomplete. Load the model again, and wrap that [P030]")


def _interrupted_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    calls = itertools.count(1)

    def interrupted(*args: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*args)

    return interrupted


def test_layers_without_values(tiny_llama: Make) -> None:
    """A model on the meta device is given its layers, to plan with or to be filled, but no start."""
    model = tiny_llama().to("meta")
    config = pissa.PissaConfig(r=4)
    wrapped = pissa.PissaModel(model, config)
    layers = pissa_layers(model)
    assert {layer.r["default"] for layer in layers.values()} == {4}
    assert all(parameter.is_meta for parameter in wrapped.parameters())
    with pytest.raises(ValueError, match="is on the meta device and holds no values"):
        decompose.decompose(model, "default", config, progressbar=False)
