"""PissaConfig: the paper's defaults, what it refuses, and the plain LoRA that it becomes."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import peft
import pytest

import pissa.model  # noqa: F401  makes the type of our adapters known to PEFT
from pissa import PissaConfig, config


def test_defaults_are_the_papers() -> None:
    config = PissaConfig(r=24)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (24, 24, 0)
    assert config.target_modules == "all-linear"
    assert config.seed == 0
    assert (config.quant, config.quant_iters, config.double_quant) == (None, 1, True)
    assert config.form == ("implicit", None)
    assert config.init_lora_weights is True


def test_alpha_follows_every_rank_unless_given() -> None:
    assert PissaConfig(r=8, rank_pattern={"q_proj": 4}).alpha_pattern == {"q_proj": 4}
    mixed = PissaConfig(r=8, rank_pattern={"q_proj": 4, "v_proj": 2}, alpha_pattern={"q_proj": 7})
    assert mixed.alpha_pattern == {"q_proj": 7, "v_proj": 2}
    given = PissaConfig(r=8, lora_alpha=16, rank_pattern={"q_proj": 4})
    assert (given.lora_alpha, given.alpha_pattern) == (16, {})


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({}, ("implicit", None)),
        ({"residual": "explicit"}, ("explicit", None)),
        ({"quant": "nf4", "double_quant": False}, ("nf4", False)),
        ({"quant": "nf4"}, ("nf4", True)),
        ({"quant": "int8"}, ("int8", None)),
        ({"quant": "int8", "double_quant": False}, ("int8", None)),
    ],
)
def test_form(fields: dict[str, object], form: tuple[object, ...]) -> None:
    assert PissaConfig(**fields).form == form


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, "`r` should be a positive integer value but the value passed is 0"),
        ({"r": 4.0}, "`r` should be a positive integer"),
        ({"r": True}, "`r` should be a positive integer"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern"),
        ({"lora_alpha": 0}, "lora_alpha: got .*; allowed: a positive number"),
        ({"lora_alpha": math.inf}, "lora_alpha: got .*; allowed: a positive number"),
        ({"alpha_pattern": {"q_proj": -2}}, "alpha_pattern"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"quant": "int5"}, "quant: got 'int5'; allowed: None, 'nf4', 'int8'"),
        ({"quant_iters": 0}, "quant_iters: got 0"),
        ({"quant": "nf4", "quant_iters": True}, "quant_iters: got True"),
        (
            {"quant_iters": 5},
            "quant_iters: got 5 without quant, .* give quant='nf4' or 'int8'.*, or leave quant_iters out",
        ),
        ({"residual": "explicit", "quant_iters": 2}, "quant_iters: got 2 without quant"),
        (
            {"quant": "nf4", "quant_iters": 2, "init": "lora"},
            "quant_iters: got 2, but .* start of 'lora'; .* 'pissa' or 'activations'",
        ),
        ({"quant": "nf4", "quant_iters": 2, "repair": "lora"}, "quant_iters: got 2, but .* start of 'lora'"),
        ({"repair": "lora"}, "repair: got 'lora' without a stored base.* give quant or residual=\"explicit\""),
        ({"quant": "nf4", "repair": "given"}, "repair: got 'given'; allowed: None, 'pissa'"),
        ({"residual": "explicit", "repair": "activations"}, "repair: got 'activations' without quant"),
        ({"quant": "nf4", "init": "loftq"}, "init: got 'loftq'; .* Instead of LoftQ, init=\"pissa\" with quant"),
        ({"quant": "nf4", "repair": "loftq"}, "repair: got 'loftq'; .* Instead of LoftQ, init=\"pissa\""),
        ({"quant": "nf3"}, "quant: got 'nf3'; allowed: None, 'nf4', 'int8', 'mxfp4', 'nvfp4', 'int4', 'fp8'"),
        ({"init": "activations"}, "init: got 'activations' without quant"),
        ({"error_feedback": True}, "error_feedback: got True without quant"),
        (
            {"quant": "nf4", "quant_iters": 5, "error_feedback": True},
            "error_feedback: got True, but the start of 'pissa' with quant_iters=5",
        ),
        ({"residual": "implicit"}, "residual: got 'implicit'; allowed: None, 'explicit'"),
        ({"quant": "nf4", "residual": "explicit"}, "residual: got 'explicit'; with quant='nf4' .* leave residual out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq' .* Instead of LoftQ, init=\"pissa\" with quant"),
        ({"init_lora_weights": False}, "init_lora_weights=False"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"layer_replication": [(0, 2)]}, "layer_replication"),
        ({"trainable_token_indices": [1, True]}, "trainable_token_indices: got True; allowed: integers"),
        ({"trainable_token_indices": {"embed_tokens": [-1]}}, "trainable_token_indices: got -1"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"eva_config": peft.EvaConfig()}, "eva_config"),
        ({"megatron_config": {}}, "megatron_config"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        PissaConfig(**fields)


def test_repair_names_another_start_than_the_adapters() -> None:
    """Alternations then belong to the residual's."""
    config = PissaConfig(r=4, init="pissa", repair="activations", quant="nf4", quant_iters=3, use_dora=True)
    base, adapter = config.of_base(), config.of_adapter()
    assert (base.init, base.repair, base.quant_iters, base.use_dora) == ("activations", None, 3, False)
    assert (adapter.init, adapter.repair, adapter.quant_iters, adapter.use_dora) == ("pissa", None, 1, True)
    same = PissaConfig(r=4, init="pissa", repair="pissa", quant="nf4")
    assert same == PissaConfig(r=4, quant="nf4")
    assert same.of_base() is same.of_adapter() is same


def test_double_quant_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="double_quant"):
        PissaConfig(double_quant=1)


def test_a_field_that_a_later_peft_adds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    later = dataclasses.make_dataclass("LoraConfig", [("later", "int | None", None)], bases=(peft.LoraConfig,))
    monkeypatch.setattr(config, "LoraConfig", later)
    monkeypatch.setattr(PissaConfig, "later", None, raising=False)
    assert PissaConfig(r=2).r == 2  # at its default it has no effect
    for value in (0, 1, "x", [3]):
        monkeypatch.setattr(PissaConfig, "later", value)
        with pytest.raises(ValueError, match=r"^later=.* is not supported with PiSSA; leave it out \(default None\)"):
            PissaConfig(r=2)


def test_what_is_supported_is_what_peft_calls_it() -> None:
    """A name that PEFT gives up would be a field that is supported and does not exist."""
    names = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert config.SUPPORTED - names == set()


def test_copies_and_pickles() -> None:
    config = PissaConfig(r=4, target_modules=["q_proj"], quant="nf4")
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("rslora", [False, True])
def test_as_lora_has_twice_the_rank_and_the_same_scaling(rslora: bool) -> None:
    ranks, alphas = {"q_proj": 4, "v_proj": 3}, {"q_proj": 5.0, "o_proj": 6.0}
    config = PissaConfig(r=8, lora_alpha=12, use_rslora=rslora, rank_pattern=ranks, alpha_pattern=alphas)
    lora = config.as_lora()
    assert type(lora) is peft.LoraConfig
    assert lora.init_lora_weights is True
    for layer in ("q_proj", "v_proj", "o_proj", "k_proj"):
        r, alpha = ranks.get(layer, 8), alphas.get(layer, 12)
        doubled, grown = lora.rank_pattern.get(layer, lora.r), lora.alpha_pattern.get(layer, lora.lora_alpha)
        assert doubled == 2 * r
        root = math.sqrt if rslora else float
        assert grown / root(doubled) == pytest.approx(alpha / root(r), rel=1e-15)
