"""Weighted sums of adapters: the sum of their changes, as an adapter like others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import pissa
from devices import fetch, put
from language_models import FORMS, Make, assert_same, error, logits, snapshot, train
from mixtures import make
from one_layer import OneLayer, filled
from oracle import change64, change_a_little
from pissa import PissaConfig, PissaModel
from pissa.layers.layer import PissaLayer, pissa_layers
from reference import EPS

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")

KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(20, 14),
    "Conv1D": lambda: Conv1D(14, 20),
    "embedding": lambda: nn.Embedding(20, 14),
    "convolution": lambda: nn.Conv2d(5, 14, 2),
}


def change(layer: PissaLayer, adapter: str) -> Tensor:
    """s (B A - B0 A0) in float64."""
    return change64(layer, *(fetch(delta.detach()).double() for delta in layer.deltas(adapter)), adapter)


def assert_sum(layer: PissaLayer, name: str, terms: dict[str, float], what: str = "") -> None:
    parts = [weight * change(layer, adapter) for adapter, weight in terms.items() if adapter in layer.r]
    # A few roundings of factors, whose products are not much larger than the changes.
    bound = 100 * EPS[torch.float32] * sum(part.norm() for part in parts)
    assert (change(layer, name) - sum(parts)).norm() <= bound, what


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -1.3), (-2.0, 0.0)], ids=str)
@pytest.mark.parametrize(("ranks", "rank"), [((2, 3), 7), ((9, 10), 14)], ids=["sum", "the smaller side"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_weighted_sum_of_the_changes(
    kind: str, ranks: tuple[int, int], rank: int, weights: tuple[float, float]
) -> None:
    """Of a PiSSA start, whose change has twice its rank, and LoRA's, with scalings of 2 and 1/2."""
    r, second = ranks
    fields: dict[str, Any] = {"target_modules": ["proj"]}
    base = put(OneLayer(filled(KINDS[kind]())))
    model = pissa.wrap(base, adapter_name="a", r=r, lora_alpha=2 * r, **fields)
    model.add_adapter("b", PissaConfig(r=second, lora_alpha=second / 2, init="lora", **fields))
    layer = model.base_model.model.proj
    change_a_little(layer, "a", size=0.3, seed=1)
    change_a_little(layer, "b", size=0.3, seed=2)
    model.add_weighted_adapter(["a", "b"], list(weights), "sum", combination_type="cat")
    assert (layer.r["sum"], layer.scaling["sum"]) == (rank, 1)
    assert_sum(layer, "sum", dict(zip("ab", weights, strict=True)))


def trained(small_llama: Make, tokens: Tensor, form: str = "implicit") -> PissaModel:
    """A model with adapters of other layers, and of other ranks where they have a layer in common."""
    model = pissa.wrap(small_llama(), r=4, adapter_name="a", target_modules=["q_proj", "v_proj"], **FORMS[form])
    second = PissaConfig(r=3, target_modules=["v_proj", "down_proj", "embed_tokens"], rank_pattern={"down_proj": 2})
    model.add_adapter("b", second)
    for name in ("a", "b"):
        model.set_adapter(name)
        train(model, tokens)
    return model


@pytest.mark.parametrize("form", FORMS)
def test_it_is_an_adapter_like_others(form: str, small_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    """Trained, saved, loaded, read by PEFT, summed again, merged, and left when its terms are deleted."""
    model = trained(small_llama, tokens, form)
    model.base_model.set_adapter(["a", "b"])
    together = logits(model, tokens)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both")
    ranks = {name.rpartition(".")[2]: layer.r["both"] for name, layer in pissa_layers(model, "both").items()}
    assert ranks == {"q_proj": 8, "v_proj": 14, "down_proj": 4, "embed_tokens": 6}
    # Two blocks, float32: sums of at most 112 products, of adapters too, in another order.
    tolerance = 200 * EPS[torch.float32]
    model.set_adapter("both")
    assert error(logits(model, tokens), together) < tolerance
    model.add_weighted_adapter(["a", "both"], [-1.0, 1.0], "b again")
    expected = {}
    for name in ("b", "b again"):
        model.set_adapter(name)
        expected[name] = logits(model, tokens)
    assert error(expected["b again"], expected["b"]) < tolerance
    assert error(expected["b"], together) > 1e-2

    model.set_adapter("both")
    train(model, tokens)
    expected["both"] = logits(model, tokens)
    assert error(expected["both"], together) > 1e-3
    model.save_pretrained(tmp_path)
    restored = PissaModel.from_pretrained(small_llama(), tmp_path / "both", "both")
    assert torch.equal(logits(restored, tokens), expected["both"])
    restored.load_adapter(tmp_path / "b again", "b again")
    restored.set_adapter("b again")
    assert torch.equal(logits(restored, tokens), expected["b again"])
    if form in ("implicit", "explicit"):  # else PEFT's base lacks the error of the codes
        plain = peft.PeftModel.from_pretrained(small_llama(), tmp_path / "both")
        assert error(logits(plain, tokens), expected["both"]) < tolerance
    for name in ("a", "b", "b again"):
        model.delete_adapter(name)
    assert torch.equal(logits(model, tokens), expected["both"])
    assert error(logits(model.merge_and_unload(), tokens), expected["both"]) < tolerance


def test_only_the_layers_of_the_adapters_are_adapted() -> None:
    """Also where another layer's name ends with the name of one."""
    inner = nn.ModuleDict({"proj": nn.Linear(8, 8)})
    wrapped = pissa.wrap(nn.ModuleDict({"proj": nn.Linear(8, 8), "inner": inner}), r=2, target_modules="proj")
    wrapped.add_weighted_adapter(["default"], [2.0], "twice")
    assert list(pissa_layers(wrapped.base_model.model, "twice")) == ["proj"]


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_fused_experts(kind: str, tokens: Tensor, tmp_path: Path) -> None:
    model = pissa.wrap(make(kind), r=2, adapter_name="a")
    model.add_adapter("b", PissaConfig(r=2, target_modules=["gate_up_proj", "o_proj"]))
    for name in ("a", "b"):
        for seed, layer in enumerate(pissa_layers(model.base_model.model, name).values()):
            change_a_little(layer, name, seed=seed)
    model.add_weighted_adapter(["a", "b"], [0.5, -1.0], "sum")
    for name, layer in pissa_layers(model.base_model.model, "sum").items():
        assert_sum(layer, "sum", {"a": 0.5, "b": -1.0}, name)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    restored = PissaModel.from_pretrained(make(kind), tmp_path / "sum")
    assert torch.equal(logits(restored, tokens), logits(model.eval(), tokens))


# ---- Refused ---------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"adapters": ["a", "nope"]}, "adapters: got 'nope'; the model has 'a', 'b', 'dora'"),
    ({"adapters": []}, "weights: got 2 for 0 adapters; needed: one for each"),
    ({"weights": [1.0]}, "weights: got 1 for 2 adapters; needed: one for each"),
    ({"weights": [1.0, float("nan")]}, "weights: got nan; allowed: finite numbers"),
    ({"adapter_name": "a"}, "Adapter with name 'a' already exists"),
    ({"adapter_name": "q_proj"}, "adapter_name: got 'q_proj'"),
    ({"combination_type": "svd"}, "got combination_type='svd'; allowed: 'cat' alone, .*`pissa convert RUN LORA`"),
    ({"combination_type": "ties", "density": 0.5}, "got combination_type='ties' and density=0.5; allowed: 'cat'"),
    ({"svd_rank": 4}, "got combination_type='cat' and svd_rank=4; allowed: 'cat' alone"),
    ({"adapters": ["a", "dora"]}, "adapters: 'dora' has use_dora=True, so it is more than a low-rank change"),
]


def test_refusals_leave_the_model_as_it_was(small_llama: Make, tokens: Tensor) -> None:
    model = trained(small_llama, tokens)
    model.add_adapter("dora", PissaConfig(r=2, target_modules=["q_proj"], use_dora=True))
    before = snapshot(model)
    for arguments, words in REFUSED:
        given = {"adapters": ["a", "b"], "weights": [1.0, 1.0], "adapter_name": "sum", **arguments}
        with pytest.raises(ValueError, match=words):
            model.add_weighted_adapter(**given)
        assert_same(model, before.copy())


@pytest.mark.parametrize("fields", [{"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_what_is_trained_beside_factors_is_not_summed(fields: dict[str, Any], small_llama: Make) -> None:
    model = pissa.wrap(small_llama(attention_bias=True), r=2, target_modules=["q_proj"], **fields)
    with pytest.raises(ValueError, match=f"'default' has {next(iter(fields))}=.*, so it is more than"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
