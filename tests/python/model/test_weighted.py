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
from reference import EPS, assert_close

forms = pytest.mark.parametrize("form", FORMS)
pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")

KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(20, 14),
    "Conv1D": lambda: Conv1D(14, 20),
    "embedding": lambda: nn.Embedding(20, 14),
    "convolution": lambda: nn.Conv2d(5, 14, 2),
}
WEIGHTS = [[1.0, 1.0], [0.7, -1.3], [-2.0, 0.0]]


def adapters(kind: str, ranks: tuple[int, int] = (2, 3), **fields: Any) -> tuple[PissaModel, PissaLayer]:
    """A layer with adapters "a" and "b", which have changed, of scalings 2 and 1/2."""
    model = pissa.wrap(
        put(OneLayer(filled(KINDS[kind]()))),
        adapter_name="a",
        target_modules=["proj"],
        r=ranks[0],
        lora_alpha=2 * ranks[0],
        **fields,
    )
    second = PissaConfig(target_modules=["proj"], r=ranks[1], lora_alpha=ranks[1] / 2, seed=5, svd="subspace")
    model.add_adapter("b", second)
    layer = model.base_model.model.proj
    change_a_little(layer, "a", size=0.3, seed=1)
    change_a_little(layer, "b", size=0.3, seed=2)
    return model, layer


def change(layer: PissaLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """s (B A - B0 A0) in float64, and the same of the absolute values of what is summed."""
    da, db = (fetch(delta.detach()).double() for delta in layer.deltas(adapter))
    return change64(layer, da, db, adapter), change64(layer, da, db, adapter, absolute=True).abs()


def total(layer: PissaLayer, weights: list[float], names: tuple[str, str] = ("a", "b")) -> tuple[Tensor, Tensor]:
    """The weighted sum of the changes, float64, and of the absolute values of what is summed."""
    changes = [change(layer, name) for name in names if name in layer.r]
    used = [weight for weight, name in zip(weights, names, strict=True) if name in layer.r]
    return tuple(sum(f(w) * c[i] for w, c in zip(used, changes, strict=True)) for i, f in enumerate((float, abs)))


# ---- One layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_cat_is_the_weighted_sum_of_the_changes(kind: str, weights: list[float]) -> None:
    model, layer = adapters(kind)
    model.add_weighted_adapter(["a", "b"], weights, "sum", "cat")
    assert layer.r["sum"] == 10
    expected, size = total(layer, weights)
    # Of the factors only those on the right are rounded: a sum, and its product with weight * scaling, itself rounded.
    assert_close(change(layer, "sum")[0].float(), expected, 4 * EPS[torch.float32] * size, "change")


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "rank"), [("svd", None), ("svd", 1), ("svd", 99), ("linear", None)])
def test_svd_and_linear_are_the_best_of_their_rank(
    kind: str, weights: list[float], method: str, rank: int | None
) -> None:
    """Adapters of rank 2 and 3 make changes of rank 4 and 6."""
    model, layer = adapters(kind, (2, 3))
    model.add_weighted_adapter(["a", "b"], weights, "sum", method, svd_rank=rank)
    r = layer.r["sum"]
    assert r == min(rank or 6, 10)
    expected, size = total(layer, weights)
    values = torch.linalg.svdvals(expected)
    got, held = change(layer, "sum")
    # The best has an error of the values left out; the factors are rounded to float32, and their sizes are `held`'s.
    rounding = 4 * EPS[torch.float32] * (held.norm() + size.norm())
    assert abs((got - expected).norm() - values[r:].norm()) <= rounding


def test_more_than_a_layer_can_hold_is_held_by_its_smaller_side() -> None:
    model, layer = adapters("linear", (9, 10))
    model.add_weighted_adapter(["a", "b"], [1.0, -1.0], "sum", "cat")
    assert layer.r["sum"] == 14
    expected, size = total(layer, [1.0, -1.0])
    assert (change(layer, "sum")[0] - expected).norm() <= 8 * EPS[torch.float32] * size.norm()


@pytest.mark.parametrize("method", ["svd", "cat"])
def test_a_sum_of_nothing_can_still_learn(method: str) -> None:
    model, layer = adapters("linear")
    model.add_weighted_adapter(["a", "b"], [0.0, 0.0], "sum", method)
    assert not change(layer, "sum")[0].any()
    model.set_adapter("sum")
    model(put(torch.randn(4, 20))).square().sum().backward()
    assert any(parameter.grad.any() for parameter in layer.factor_parameters("sum"))


def test_variants_are_summed_as_what_they_change() -> None:
    model, layer = adapters("linear", use_rslora=True)
    expected, size = total(layer, [0.5, 2.0])
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "sum", "cat")
    assert layer.scaling["sum"] == 1
    assert_close(change(layer, "sum")[0].float(), expected, 4 * EPS[torch.float32] * size, "change")


# ---- A model ---------------------------------------------------------------------------------------------------------


def trained(small_llama: Make, tokens: Tensor, form: str = "implicit") -> PissaModel:
    """A model with adapters of other layers, and of other ranks where they have a layer in common."""
    model = pissa.wrap(small_llama(), r=4, adapter_name="a", target_modules=["q_proj", "v_proj"], **FORMS[form])
    second = PissaConfig(r=3, target_modules=["v_proj", "down_proj", "embed_tokens"], rank_pattern={"down_proj": 2})
    model.add_adapter("b", second)
    for name in ("a", "b"):
        model.set_adapter(name)
        train(model, tokens)
    return model


@forms
@pytest.mark.filterwarnings("ignore:Adapter b again was active which is now deleted:UserWarning")
def test_it_is_an_adapter_like_others(form: str, small_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    model = trained(small_llama, tokens, form)
    base = model.base_model.model
    with model.disable_adapter():
        before = logits(model, tokens)
    model.base_model.set_adapter(["a", "b"])
    together = logits(model, tokens)
    assert error(together, before) > 1e-2
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both", combination_type="cat")
    model.add_weighted_adapter(["a", "both"], [-1.0, 1.0], "b again", svd_rank=6)
    ranks = {name: layer.r["both"] for name, layer in pissa_layers(base, "both").items()}
    assert {rank for name, rank in ranks.items() if "v_proj" in name} == {14}
    assert {name.rpartition(".")[2]: r for name, r in ranks.items() if "v_proj" not in name} == {
        "q_proj": 8,
        "down_proj": 4,
        "embed_tokens": 6,
    }
    expected = {}
    # Two blocks, float32: sums of at most 112 products, of adapters too, in another order.
    tolerance = 200 * EPS[torch.float32]
    model.set_adapter("both")
    expected["both"] = logits(model, tokens)
    assert error(expected["both"], together) < tolerance
    model.set_adapter("b")
    alone = logits(model, tokens)
    model.set_adapter("b again")
    expected["b again"] = logits(model, tokens)
    assert error(expected["b again"], alone) < tolerance
    train(model, tokens)
    expected["b again"] = logits(model, tokens)
    assert error(expected["b again"], alone) > 1e-3

    model.save_pretrained(tmp_path)
    for name, values in expected.items():
        restored = PissaModel.from_pretrained(small_llama(), tmp_path / name, adapter_name=name)
        assert torch.equal(logits(restored, tokens), values), name
        if form != "nf4":  # there PEFT's base lacks the error of the 4 bits
            plain = peft.PeftModel.from_pretrained(small_llama(), tmp_path / name)
            assert error(logits(plain, tokens), values) < tolerance
    restored.load_adapter(tmp_path / "both", "both")
    restored.set_adapter("both")
    assert torch.equal(logits(restored, tokens), expected["both"])

    for name in ("a", "b", "b again"):
        model.delete_adapter(name)
    assert torch.equal(logits(model, tokens), expected["both"])
    model.delete_adapter("both")
    assert torch.equal(logits(base, tokens), before)


def test_only_the_layers_of_the_adapters_are_adapted(tokens: Tensor) -> None:
    """Also where another layer's name ends with the name of one."""

    def model() -> nn.Module:
        return nn.ModuleDict({"proj": nn.Linear(8, 8), "inner": nn.ModuleDict({"proj": nn.Linear(8, 8)})})

    wrapped = pissa.wrap(model(), r=2, target_modules="proj")
    wrapped.add_weighted_adapter(["default"], [2.0], "twice")
    assert list(pissa_layers(wrapped.base_model.model, "twice")) == ["proj"]


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_fused_experts(kind: str, tokens: Tensor, tmp_path: Path) -> None:
    model = pissa.wrap(make(kind), r=2, adapter_name="a")
    model.add_adapter("b", PissaConfig(r=2, target_modules=["gate_up_proj", "o_proj"]))
    for name in ("a", "b"):
        for seed, layer in enumerate(pissa_layers(model.base_model.model, name).values()):
            change_a_little(layer, name, seed=seed)
    model.add_weighted_adapter(["a", "b"], [0.5, -1.0], "sum", "linear")
    for name, layer in pissa_layers(model.base_model.model, "sum").items():
        expected, size = total(layer, [0.5, -1.0])
        got, held = change(layer, "sum")
        rounding = 4 * EPS[torch.float32] * (held.norm() + size.norm())
        assert abs((got - expected).norm() - torch.linalg.svdvals(expected)[4:].norm()) <= rounding, name
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    restored = PissaModel.from_pretrained(make(kind), tmp_path / "sum")
    assert torch.equal(logits(restored, tokens), logits(model.eval(), tokens))


# ---- Refused ---------------------------------------------------------------------------------------------------------


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"adapters": ["a", "nope"]}, r"Adapter nope does not exist; the model has a, b, dora"),
    ({"adapters": []}, r"got 0 adapters and 2 weights"),
    ({"weights": [1.0]}, r"got 2 adapters and 1 weights"),
    ({"weights": [1.0, float("nan")]}, r"weights must be finite numbers, got nan"),
    ({"adapter_name": "a"}, r"Adapter with name 'a' already exists"),
    ({"adapter_name": "q_proj"}, r"adapter_name: got 'q_proj'"),
    ({"combination_type": "sum"}, r"Invalid combination_type: 'sum'; allowed: svd, linear, cat\."),
    ({"combination_type": "ties", "density": 0.5}, r"'ties'; .* `pissa merge`, and give them to a tool that merges"),
    ({"svd_rank": 0}, r"svd_rank must be a positive integer or None, got 0"),
    ({"svd_clamp": 0.9}, r"svd_clamp=0.9 is not supported: leave it out"),
    ({"adapters": ["a", "dora"]}, r"dora has use_dora=True, which trains more than factors: merge it"),
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
    with pytest.raises(ValueError, match=f"default has {next(iter(fields))}=.*, which trains more than factors"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_its_init_cannot_be_asked_for(small_llama: Make) -> None:
    with pytest.raises(ValueError, match=r"init='given' marks an adapter whose factors came from elsewhere"):
        pissa.wrap(small_llama(), r=2, init="given")
