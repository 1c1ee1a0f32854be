"""Targets that are left to us: the language part of a model that has others; small layers get the rank that they have
room for, layers that the model's code goes past are left out, and one warning says so."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import architecture_checks as checks
import pissa
from architectures import ARCHITECTURES, GROUPED, TEXT, Architecture, _model, _text
from language_models import TWO_FORMS as FORMS
from oracle import change_a_little
from pissa import notices
from pissa.layers.layer import pissa_layers
from reference import EPS

ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
QWEN = {**TEXT, **GROUPED, **ROUTED, "shared_expert_intermediate_size": 24, "experts_implementation": "eager"}
# Small layers, with the rank that each has room for, and layers that are left out.
FAMILIES = {
    "mamba": (
        ARCHITECTURES["mamba"],
        {},
        [f"backbone.layers.{i}.mixer.{leaf}" for i in (0, 1) for leaf in ("x_proj", "dt_proj", "out_proj")],
    ),
    "mamba2": (ARCHITECTURES["mamba2"], {}, [f"backbone.layers.{i}.mixer.out_proj" for i in (0, 1)]),
    "llama4": (ARCHITECTURES["llama4"], {}, ["model.layers.1.feed_forward.router"]),
    "qwen2_moe": (
        Architecture(_model("Qwen2Moe", **QWEN), _text, "CAUSAL_LM"),
        {f"model.layers.{i}.mlp.shared_expert_gate": 1 for i in (0, 1)},
        [],
    ),
}
SAID = "ignore::pissa.notices.AllLinearWarning"
STORED = "ignore::pissa.notices.InexactLoraWarning"
pytestmark = pytest.mark.filterwarnings(STORED)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_warning_names_what_is_chosen(family: str) -> None:
    architecture, small, left_out = FAMILIES[family]
    with pytest.warns(notices.AllLinearWarning, match="target_modules is 'all-linear'") as caught:
        model = checks.wrapped(architecture, {})
    (warning,) = [str(entry.message) for entry in caught if entry.category is notices.AllLinearWarning]
    layers = pissa_layers(model.base_model.model, checks.ADAPTER)
    assert {name: layer.r[checks.ADAPTER] for name, layer in layers.items() if layer.r[checks.ADAPTER] != 4} == small
    assert {layer.scaling[checks.ADAPTER] for layer in layers.values()} == {1.0}
    linear = [name for name, module in architecture.make().named_modules() if isinstance(module, nn.Linear)]
    missing = [name for name in linear if name not in layers and name != "lm_head"]
    assert missing == left_out
    if small:
        name, rank = next(iter(small.items()))
        found = f"r=4 is more than the smaller side of {len(small)} of {len(layers) + len(missing)} layers, {name} the"
        assert found in warning
        assert f"{rank} for the first" in warning
    if left_out:
        assert f"{len(left_out)} of {len(layers) + len(missing)} layers, {left_out[0]} the first, are left" in warning


def test_a_subclass_that_computes_something_else_is_left_out() -> None:
    """Attention of torch reads the weight of its output layer, which has a class of its own."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "proj": nn.Linear(8, 8)})
    said = r"1 of 2 layers, attention.out_proj the first, are left out: a NonDynamicallyQuantizableLinear computes"
    with pytest.warns(notices.AllLinearWarning, match=said):
        assert sizes(pissa.wrap(model, r=2)).keys() == {"proj"}


@pytest.mark.filterwarnings(SAID)
@pytest.mark.parametrize("form", FORMS)
def test_a_model_with_smaller_ranks_works_as_others_do(form: str, tmp_path: Path) -> None:
    architecture = FAMILIES["qwen2_moe"][0]
    life = checks.Life(architecture, FORMS[form], tmp_path)
    for check in checks.LIFE[1:]:  # the start is not that of an exact decomposition
        check(life)


class Gates(nn.Module):
    """Linear layers of which one has one row, and another's name ends with its name."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 1)
        self.inner = nn.ModuleDict({"gate": nn.Linear(8, 6), "proj": nn.Linear(8, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner["proj"](x) * torch.sigmoid(self.gate(x))
        return torch.cat([y, self.inner["gate"](x)], dim=-1)


def gates() -> Gates:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Gates()


X = torch.linspace(-1, 1, 24).reshape(3, 8)


def sizes(model: nn.Module, adapter: str = "default") -> dict[str, tuple[int, float]]:
    layers = pissa_layers(model.base_model.model, adapter)
    return {name: (layer.r[adapter], layer.scaling[adapter]) for name, layer in layers.items()}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"gate": (1, 1.0), "inner.gate": (4, 1.0), "inner.proj": (4, 1.0)}),
        ({"target_modules": "All-Linear", "lora_alpha": 8}, dict.fromkeys(["gate", "inner.gate", "inner.proj"], 2.0)),
        ({"use_rslora": True, "lora_alpha": 6}, dict.fromkeys(["gate", "inner.gate", "inner.proj"], 3.0)),
        ({"alpha_pattern": {"gate": 2}}, {"gate": 0.5, "inner.gate": 0.5, "inner.proj": 1.0}),
        ({"rank_pattern": {"inner.gate": 2}}, {"gate": (1, 1.0), "inner.gate": (2, 1.0), "inner.proj": (4, 1.0)}),
        ({"use_dora": True}, {"gate": (1, 1.0), "inner.gate": (4, 1.0), "inner.proj": (4, 1.0)}),
        ({"quant": "nf4"}, {"gate": (1, 1.0), "inner.gate": (4, 1.0), "inner.proj": (4, 1.0)}),
        ({"r": 8}, {"gate": (1, 1.0), "inner.gate": (6, 1.0), "inner.proj": (8, 1.0)}),
    ],
)
@pytest.mark.filterwarnings(SAID)
def test_a_capped_layer_has_the_scaling_that_was_asked_for_here_and_in_peft(
    fields: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    model = pissa.wrap(gates(), **{"r": 4, **fields})
    for name, size in expected.items():
        assert sizes(model)[name] == size if isinstance(size, tuple) else sizes(model)[name][1] == size, name
    for seed, layer in enumerate(pissa_layers(model.base_model.model, "default").values()):
        change_a_little(layer, size=0.3, seed=seed)
    model.eval()
    with torch.no_grad():
        y = model(X)
        assert not torch.allclose(y, gates()(X))
        model.save_pretrained(tmp_path)
        restored = pissa.PissaModel.from_pretrained(gates(), tmp_path)
        assert torch.equal(restored(X), y)
        assert sizes(restored) == sizes(model)
        if "quant" not in fields:  # there PEFT's base lacks the error of the 4 bits
            # Sums of at most 8 products and an adapter's, of size 1, in float32; sigmoid does not enlarge errors.
            assert (peft.PeftModel.from_pretrained(gates(), tmp_path)(X) - y).abs().max() < 64 * EPS[torch.float32]


def test_ranks_and_targets_that_the_user_names_are_taken_as_they_are() -> None:
    for fields in ({"target_modules": ["gate"]}, {"rank_pattern": {"gate": 3}}, {"target_modules": ".*gate"}):
        with pytest.raises(ValueError, match=r"is too large for layer gate: its weight is 1 x 8"):
            pissa.wrap(gates(), **{"r": 4, **fields})


def test_nothing_is_said_of_layers_that_the_user_leaves_out() -> None:
    """A warning would be an error."""
    model = pissa.wrap(gates(), r=4, exclude_modules=r"gate")
    assert set(sizes(model)) == {"inner.gate", "inner.proj"}
    assert not model.peft_config["default"].rank_pattern
    pissa.wrap(gates(), r=4, rank_pattern={"^gate": 1})


def test_a_second_adapter_is_capped_too() -> None:
    model = pissa.wrap(gates(), r=2, target_modules=["proj"])
    with pytest.warns(notices.AllLinearWarning, match="of 1 of 3 layers, gate the first; .* 1 for") as caught:
        model.add_adapter("second", pissa.PissaConfig(r=4))
    assert caught[0].filename == __file__
    assert sizes(model, "second") == {"gate": (1, 1.0), "inner.gate": (4, 1.0), "inner.proj": (4, 1.0)}
    with pytest.warns(notices.AllLinearWarning, match="all-linear") as caught:
        pissa.wrap(gates(), r=4)
    assert caught[0].filename == __file__


def test_a_layer_that_pefts_lora_refuses_is_an_error_when_it_is_named() -> None:
    """Mamba's kernels read the weight of out_proj without calling it: its adapter would do nothing."""
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba"):
        pissa.wrap(ARCHITECTURES["mamba2"].make(), r=2, target_modules=["out_proj"])


def test_a_layer_that_is_never_called_is_an_error_when_it_is_named() -> None:
    model = ARCHITECTURES["mamba"].make()
    with pytest.raises(TypeError, match=r"mixer\.dt_proj is in a MambaMixer, which multiplies by its weight"):
        pissa.wrap(model, r=2, target_modules=["in_proj", "dt_proj"])
    assert sizes(pissa.wrap(model, r=2, target_modules=["in_proj", "x_proj"]))  # transformers calls it without kernels


# ---- Models that see ---------------------------------------------------------------------------------------------


VISION = {"qwen2_5_vl": "model.visual", "gemma3, vision-language": "model.vision_tower"}
vision = pytest.mark.parametrize("name", VISION)


@vision
def test_the_language_part_alone_is_meant(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = ARCHITECTURES[name].make()
    linear = {n for n, module in model.named_modules() if isinstance(module, nn.Linear) and n != "lm_head"}
    language = {n for n in linear if n.startswith("model.language_model.")}
    assert {n for n in linear if n.startswith(VISION[name])} <= linear - language
    with caplog.at_level(logging.INFO, logger="pissa"):
        assert sizes(pissa.wrap(model, r=2)).keys() == language
    assert "only model.language_model is adapted" in caplog.text
    assert all(n in caplog.text for n in linear - language)


@pytest.mark.parametrize(
    ("targets", "excluded"),
    [
        (r".*\.(language_model|visual)\..*\.(q_proj|qkv|mlp\.0)", None),
        (["q_proj", "qkv", "mlp.0", "gate_proj"], r".*gate_proj"),
    ],
    ids=str,
)
def test_the_vision_tower_is_adapted_on_request(targets: Any, excluded: str | None, tmp_path: Path) -> None:
    """By PEFT's own words; it learns, is restored, and is the same in PEFT."""
    architecture = ARCHITECTURES["qwen2_5_vl"]
    model = checks.wrapped(architecture, {"target_modules": targets, "exclude_modules": excluded})
    assert {n.rpartition(".")[2] for n in sizes(model) if ".visual." in n} == {"qkv", "0"}
    assert {n.rpartition(".")[2] for n in sizes(model) if ".visual." not in n} == {"q_proj"}
    batch = architecture.batch()
    checks.step(model, batch)
    for name, layer in pissa_layers(model.base_model.model, "default").items():
        assert all(delta.any() for delta in layer.deltas("default")), name
    model.save_pretrained(tmp_path)
    expected = checks.output(model, batch)
    assert torch.equal(checks.output(pissa.PissaModel.from_pretrained(architecture.make(), tmp_path), batch), expected)
    plain = checks.output(peft.PeftModel.from_pretrained(architecture.make(), tmp_path), batch)
    # A sum of at most 64 products in each of two blocks, in float32.
    assert (plain - expected).abs().max() < 2 * 64 * EPS[torch.float32] * expected.abs().max()
