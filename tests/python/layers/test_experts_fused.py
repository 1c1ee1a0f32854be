"""Unfused experts are fused again: in the files, as PEFT lays them out, and when adapters are merged or unloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import pissa
from daily import each
from language_models import FORMS, error, logits, train
from mixtures import KINDS, ROUTED, R, make
from oracle import change_a_little, change_all
from pissa.layers.layer import pissa_layers
from reference import EPS

kinds = pytest.mark.parametrize("kind", each(KINDS, ["mixtral", "gpt_oss"]))
pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.AllLinearWarning")  # Llama 4's router


@kinds
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["gate_up_proj"]},
        {"target_modules": ["down_proj"], "use_rslora": True},
        {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"gate_up_proj": 5, "o_proj": 4}},
        {"r": 28},  # more than some weights have rows or columns, those of experts too
    ],
    ids=str,
)
def test_plain_peft_loads_it_and_computes_the_same(
    kind: str, fields: dict[str, Any], tokens: Tensor, tmp_path: Path
) -> None:
    model = pissa.wrap(make(kind), **{"r": R, "lora_alpha": 3, **fields})
    change_all(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"]
    plain = peft.PeftModel.from_pretrained(make(kind), tmp_path)
    got, expected = logits(plain, tokens), logits(model, tokens)
    assert error(expected, logits(make(kind), tokens)) > 5e-3
    # PEFT adds the change to the weight and multiplies once: float32's rounding through two blocks.
    assert error(got, expected) < 100 * EPS[torch.float32]


@kinds
@pytest.mark.parametrize("form", FORMS)
def test_unloading_gives_the_fused_weights_back(kind: str, form: str, tokens: Tensor) -> None:
    base = make(kind)
    before, output = {name: value.clone() for name, value in base.state_dict().items()}, logits(base, tokens)
    modules = [type(module) for module in base.modules()]
    model = pissa.wrap(base, r=R, **FORMS[form])
    stored = logits(model, tokens)
    change_all(model)
    unloaded = model.unload()
    assert [type(module) for module in unloaded.modules()] == modules
    assert list(unloaded.state_dict()) == list(before)
    if form == "implicit":
        assert all(torch.equal(value, before[name]) for name, value in unloaded.state_dict().items())
        assert torch.equal(logits(unloaded, tokens), output)
    assert error(logits(unloaded, tokens), stored) < 100 * EPS[torch.float32]
    assert pissa_layers(pissa.wrap(unloaded, r=R).base_model.model, "default")


def test_biases_are_trained_as_in_plain_peft(tokens: Tensor, tmp_path: Path) -> None:
    """bias="all" means what is called "bias": the attention's and the router's, not the stacks of the experts'."""
    model = pissa.wrap(make("gpt_oss"), r=R, bias="all")
    plain = peft.get_peft_model(make("gpt_oss"), peft.LoraConfig(bias="all", target_modules=["q_proj"]))
    trained, theirs = (
        {name for name, p in m.named_parameters() if name.endswith("bias") and p.requires_grad} for m in (model, plain)
    )
    assert {name.replace(".base_layer", "") for name in trained} == {n.replace(".base_layer", "") for n in theirs}
    train(model, tokens)
    model.save_pretrained(tmp_path)
    again = pissa.PissaModel.from_pretrained(make("gpt_oss"), tmp_path)
    assert torch.equal(logits(again, tokens), logits(model.eval(), tokens))
    loaded = peft.PeftModel.from_pretrained(make("gpt_oss"), tmp_path)
    assert error(logits(loaded, tokens), logits(model, tokens)) < 100 * EPS[torch.float32]


def test_a_second_adapter_on_unfused_experts(tokens: Tensor) -> None:
    model = pissa.wrap(make("mixtral"), r=R, target_modules=["q_proj"])
    before = logits(model, tokens)
    model.add_adapter("second", pissa.PissaConfig(r=R, target_modules=["w1", "w2", "w3"]))
    model.set_adapter("second")
    assert torch.equal(logits(model, tokens), before)
    losses = train(model, tokens)
    assert losses[-1] < losses[0]
    assert error(logits(model.eval(), tokens), before) > 1e-3
    model.set_adapter("default")
    assert torch.equal(logits(model, tokens), before)
    model.delete_adapter("second")
    assert torch.equal(logits(model.unload(), tokens), before)


@pytest.mark.parametrize("kind", ROUTED)  # Llama 4's shared expert, too, is handed no rows
def test_rows_with_adapters_of_their_own_are_refused_where_experts_are_adapted(kind: str, tokens: Tensor) -> None:
    """By as many names as an expert has tokens, too; an adapter that leaves the experts out may be one of them."""
    model = pissa.wrap(make(kind), r=R).eval()
    model.add_adapter("attention", pissa.PissaConfig(r=R, target_modules=["o_proj"]))
    change_all(model)
    for layer in pissa_layers(model.base_model.model, "attention").values():
        change_a_little(layer, "attention")
    tokens = tokens[:, :1].expand(-1, 4)  # one token many times: every row of an expert that has any is one
    for names in (["default"] * len(tokens), ["default", "__base__", "attention"]):
        with pytest.raises(ValueError, match=r"experts\.\d\.\w+ is an expert's.* by default\. Call set_adapter and"):
            model(input_ids=tokens, adapter_names=names)
    with torch.no_grad():
        mixed = model(input_ids=tokens, adapter_names=["attention", "__base__", "attention"]).logits
        with model.disable_adapter():
            base = logits(model, tokens)
        model.set_adapter("attention")
        expected = logits(model, tokens)
        expected[1] = base[1]
    assert error(mixed, base) > 1e-3
    assert error(mixed, expected) < 100 * EPS[torch.float32]
