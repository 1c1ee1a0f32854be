"""Targets that are left to us: small layers get the rank that they have room for, what PEFT refuses is left out, and
one warning says so."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import architecture_checks as checks
import pissa
from architectures import GROUPED, TEXT, Architecture, _model, _text
from language_models import TWO_FORMS as FORMS
from oracle import change_a_little
from pissa import notices
from pissa.layers.layer import pissa_layers
from reference import EPS

MAMBA: dict[str, Any] = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.1}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
QWEN = {**TEXT, **GROUPED, **ROUTED, "shared_expert_intermediate_size": 24, "experts_implementation": "eager"}
# Small layers, with the rank that each has room for, and layers that are left out.
FAMILIES = {
    "mamba": (
        Architecture(_model("Mamba", **MAMBA, time_step_rank=2), _text, "CAUSAL_LM"),
        {f"backbone.layers.{i}.mixer.dt_proj": 2 for i in (0, 1)},
        {f"backbone.layers.{i}.mixer.out_proj" for i in (0, 1)},
    ),
    "mamba2": (
        Architecture(
            _model("Mamba2", **MAMBA, num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=4),
            _text,
            "CAUSAL_LM",
        ),
        {},
        {f"backbone.layers.{i}.mixer.out_proj" for i in (0, 1)},
    ),
    "qwen2_moe": (
        Architecture(_model("Qwen2Moe", **QWEN), _text, "CAUSAL_LM"),
        {f"model.layers.{i}.mlp.shared_expert_gate": 1 for i in (0, 1)},
        set(),
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
    linear = {name for name, module in architecture.make().named_modules() if type(module) is nn.Linear}
    missing = linear - layers.keys() - {"lm_head"}
    assert missing == left_out
    if small:
        name, rank = next(iter(small.items()))
        found = f"r=4 is more than the smaller side of {len(small)} of {len(layers) + len(missing)} layers, {name} the"
        assert found in warning
        assert f"{rank} for the first" in warning
    if left_out:
        assert f"{len(left_out)} of {len(layers) + len(missing)} layers, {min(left_out)} the first, are left" in warning


@pytest.mark.filterwarnings(SAID)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_such_a_model_works_as_others_do(family: str, form: str, tmp_path: Path) -> None:
    architecture = FAMILIES[family][0]
    for check in (checks.check_start, checks.check_step_0, checks.check_training_step):
        check(architecture, FORMS[form])
    checks.check_save_and_reload(architecture, FORMS[form], tmp_path)
    if family == "mamba":  # transformers' code reads dt_proj's weight and does not call it
        architecture = dataclasses.replace(architecture, fields={"exclude_modules": ["dt_proj"]})
    checks.check_gradients(architecture, FORMS[form])
    checks.check_merge(architecture, FORMS[form])


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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
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
        pissa.wrap(FAMILIES["mamba2"][0].make(), r=2, target_modules=["out_proj"])
