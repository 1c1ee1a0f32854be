"""pissa.integrations.peft: what becomes of a program's LoraConfig is ours where it should be, and PEFT's else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model  # before enable(), as programs do
from torch import Tensor, nn

import pissa
from bnb_layers import bnb
from daily import each
from language_models import Make, error, logits, train
from pissa import PissaConfig, PissaModel, notices
from pissa.integrations.peft import disable, enable, is_enabled
from trainers import assert_equal, state, trainable

said: list[str] = []

# PEFT does not know our layer over bitsandbytes' bytes, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type .*BnbLinear4bit:UserWarning")


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    said.clear()
    enable(said.append)
    yield
    disable()


def of_peft() -> list[dict[str, int]]:
    """All that could have been replaced."""
    places = [vars(peft), vars(peft.mapping_func), vars(peft.peft_model), vars(PeftModel), vars(peft.LoraModel)]
    tables = [peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING, peft.PEFT_TYPE_TO_TUNER_MAPPING, peft.PEFT_TYPE_TO_CONFIG_MAPPING]
    return [{str(key): id(value) for key, value in place.items()} for place in (*places, *tables)]


def test_disable_restores_peft() -> None:
    disable()
    before = of_peft()
    for _ in range(2):
        enable()
    assert is_enabled()
    assert of_peft() != before
    for _ in range(2):
        disable()
        assert not is_enabled()
        assert of_peft() == before


# -- PiSSA

QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 8}
PISSA: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"target_modules": None}, QV),
    "all linear layers": ({"target_modules": "all-linear"}, {"lora_alpha": 8}),
    "rslora": ({"target_modules": "all-linear"}, {"lora_alpha": 6, "use_rslora": True}),
    "patterns": (
        {"target_modules": "all-linear"},
        {"lora_alpha": 6, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    ),
    "more is trained": ({}, QV | {"bias": "lora_only"}),
    "a task": ({}, QV | {"task_type": "CAUSAL_LM"}),
    "dora": ({}, QV | {"use_dora": True}),
    "tokens": ({}, QV | {"trainable_token_indices": [3], "modules_to_save": ["lm_head"]}),
}
"""Fields of a LoraConfig beyond those of the PissaConfig, and the PissaConfig that it stands for. LoRA's alpha is 8; in
a Llama PEFT itself adapts q_proj and v_proj."""


@pytest.mark.parametrize("init", each(["pissa", "pissa_niter_4"], ["pissa"]))
@pytest.mark.parametrize("case", PISSA)
def test_pissa_is_ours(case: str, init: str, tiny_llama: Make, tokens: Tensor) -> None:
    theirs, ours = PISSA[case]
    given = LoraConfig(r=4, init_lora_weights=init, **ours | theirs)
    model, wrapped = get_peft_model(tiny_llama(), given), pissa.wrap(tiny_llama(), PissaConfig(r=4, **ours))
    assert type(model) is type(wrapped)
    assert model.peft_config == wrapped.peft_config
    assert_equal(state(model), state(wrapped))
    assert trainable(model) == trainable(wrapped)
    assert torch.equal(logits(model, tokens), logits(tiny_llama(), tokens))
    assert train(model, tokens) == train(wrapped, tokens)
    assert given.init_lora_weights == init
    layers = sum(isinstance(module, pissa.layers.PissaLinear) for module in model.modules())
    assert said == [f"LoraConfig(init_lora_weights={init!r}) became PiSSA: rank 4, {layers} layers, the base unchanged"]


def test_dropout_is_taken_over(tiny_llama: Make) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(init_lora_weights="pissa", lora_dropout=0.5))
    assert model.peft_config["default"].lora_dropout == 0.5


def test_what_is_saved_is_read_with_and_without_us(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    axolotls = {"fan_in_fan_out": None, "target_parameters": [], "modules_to_save": None}
    given = LoraConfig(r=4, init_lora_weights="pissa", target_modules="all-linear", **axolotls)
    model = get_peft_model(tiny_llama(), given)
    train(model, tokens)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["init_lora_weights"], config["r"]) == ("LORA", True, 8)

    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, "default", True, offload_folder="offload")
    assert isinstance(again, PissaModel)
    assert torch.equal(logits(again, tokens), expected)
    assert trainable(again) == trainable(model)
    again.load_adapter(tmp_path, "default", is_trainable=True)  # as transformers' Trainer resumes
    assert train(again, tokens) == train(model, tokens)

    disable()
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert type(plain) is PeftModel
    assert error(logits(plain, tokens), expected) < 1e-5


def test_what_peft_has_saved_is_peft_s(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    """A folder of PEFT's own PiSSA, too, whose adapter is one for the residual."""
    disable()
    theirs = get_peft_model(tiny_llama(), LoraConfig(r=4, init_lora_weights="pissa", task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path)
    expected = logits(PeftModel.from_pretrained(tiny_llama(), tmp_path), tokens)
    enable()
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert type(again) is peft.PeftModelForCausalLM
    assert torch.equal(logits(again, tokens), expected)
    with pytest.raises(ValueError, match="nowhere"):
        PeftModel.from_pretrained(tiny_llama(), "nowhere")


@dataclass
class Own(LoraConfig):  # type: ignore[misc]
    """A program's own configuration."""

    rate_ratio: float | None = None


def test_a_field_that_only_a_program_knows(tiny_llama: Make) -> None:
    model = get_peft_model(tiny_llama(), Own(r=4, init_lora_weights="pissa"))
    assert isinstance(model, PissaModel)
    with pytest.warns(
        notices.NotTakenOverWarning, match=r"'pissa'\) stays PEFT's own, .* the base: rate_ratio=2"
    ) as got:
        model = get_peft_model(tiny_llama(), Own(r=4, init_lora_weights="pissa", rate_ratio=2))
    assert got[0].filename == __file__
    assert type(model) is PeftModel


# -- LoRA that is to start as PiSSA


def test_a_config_without_a_start_becomes_pissa_if_that_is_asked(tiny_llama: Make, tokens: Tensor) -> None:
    enable(said.append, init="pissa")
    given = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model, wrapped = get_peft_model(tiny_llama(), given), pissa.wrap(tiny_llama(), r=4, lora_alpha=8)
    assert_equal(state(model), state(wrapped))
    assert train(model, tokens) == train(wrapped, tokens)
    assert said == ["LoraConfig(init_lora_weights=True) became PiSSA: rank 4, 14 layers, the base unchanged"]
    assert isinstance(get_peft_model(in_4_bits(tiny_llama), LoraConfig(r=4)), PissaModel)
    assert said[1].startswith("LoraConfig(init_lora_weights=True) became PiSSA: ")
    for start in ("gaussian", False, "olora"):
        assert type(get_peft_model(tiny_llama(), LoraConfig(r=4, init_lora_weights=start))) is PeftModel
    enable()
    assert type(get_peft_model(tiny_llama(), LoraConfig(r=4))) is PeftModel


def test_a_start_that_was_asked_is_had_or_an_error(tiny_llama: Make) -> None:
    enable(init="pissa")
    with pytest.raises(ValueError, match=r"was to start as PiSSA, but lora_bias=True is not supported"):
        get_peft_model(tiny_llama(), LoraConfig(r=4, lora_bias=True))
    with pytest.raises(ValueError, match="init: got 'olora'"):
        enable(init="olora")  # type: ignore[arg-type]


def test_fused_kernels_of_a_program_are_refused(tiny_llama: Make) -> None:
    """They would take dA and dB for A and B."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, init_lora_weights="pissa", target_modules=["lm_head"]))
    factors = (model.lm_head.lora_A["default"].weight, model.lm_head.lora_B["default"].weight)
    with pytest.raises(TypeError, match=r"layer .*lm_head: .* lora_mlp_kernel"):
        (factors[1] @ factors[0]).sum().backward()


# -- what is PEFT's

THEIRS: dict[str, peft.PeftConfig] = {
    "lora": LoraConfig(r=4),
    "gaussian": LoraConfig(r=4, init_lora_weights="gaussian", task_type="CAUSAL_LM"),
    "random": LoraConfig(r=4, init_lora_weights=False, use_rslora=True),
    "dora": LoraConfig(r=4, use_dora=True),
    "olora": LoraConfig(r=4, init_lora_weights="olora"),
    "bias": LoraConfig(r=4, lora_bias=True),
    "adalora": peft.AdaLoraConfig(total_step=9, task_type="CAUSAL_LM"),
    "ia3": peft.IA3Config(task_type="CAUSAL_LM"),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("case", THEIRS)
def test_everything_else_is_as_before(case: str, tiny_llama: Make, tokens: Tensor) -> None:
    """Bit for bit, and of the same class."""
    runs = []
    for switch in (enable, disable):
        switch()
        torch.manual_seed(3)
        config = type(THEIRS[case])(**{**THEIRS[case].to_dict(), "peft_type": None})
        model = get_peft_model(tiny_llama(), config)
        runs.append((type(model), train(model, tokens), state(model)))
    (kind, losses, tensors), (plain, expected, before) = runs
    assert kind is plain
    assert losses == expected
    assert_equal(tensors, before)
    assert not said


def test_a_mixed_model_is_peft_s(tiny_llama: Make) -> None:
    assert type(get_peft_model(tiny_llama(), LoraConfig(), mixed=True)) is peft.PeftMixedModel


# -- LoRA on 4 bits


def in_4_bits(tiny_llama: Make, quant_type: str = "nf4") -> nn.Module:
    model = tiny_llama(intermediate_size=128)  # blocks of 64 in whole rows
    layers = {name: module for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    for name, linear in layers.items():
        layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type=quant_type)
        layer.load_state_dict(linear.state_dict())
        model.model.set_submodule(name, layer.to("cpu").train())
    return model.train()


MORE: dict[str, dict[str, Any]] = {
    "default": {},
    "modules": {"modules_to_save": ["lm_head"], "target_modules": "all-linear"},
    "tokens": {"trainable_token_indices": [3], "use_rslora": True, "rank_pattern": {"v_proj": 2}},
}


@pytest.mark.parametrize("init", each([True, "gaussian", False], ["gaussian"]))
@pytest.mark.parametrize("more", MORE)
def test_lora_on_4_bits_computes_with_our_kernels(
    init: str | bool, more: str, tiny_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    """It trains what PEFT trains, from the same random numbers, to the same losses, with weight decay too."""
    models, generators = [], []
    for switch in (enable, disable):
        switch()
        torch.manual_seed(3)
        config = LoraConfig(r=4, init_lora_weights=init, task_type="CAUSAL_LM", **MORE[more])
        models.append(get_peft_model(in_4_bits(tiny_llama), config))
        generators.append(torch.get_rng_state())
    ours, theirs = models
    assert isinstance(ours, PissaModel)
    assert type(theirs) is peft.PeftModelForCausalLM
    assert torch.equal(*generators)
    assert trainable(ours) == trainable(theirs)
    parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert not parameter.requires_grad or torch.equal(parameter, parameters[name])
    losses, expected = (_train_with_decay(model, tokens) for model in models)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]

    expected_logits = ours(input_ids=tokens).logits
    ours.eval().save_pretrained(tmp_path)
    enable()
    again = PeftModel.from_pretrained(in_4_bits(tiny_llama), tmp_path)
    assert isinstance(again, PissaModel)
    assert torch.equal(logits(again, tokens), logits(ours, tokens))
    disable()
    plain = PeftModel.from_pretrained(in_4_bits(tiny_llama), tmp_path, is_trainable=True).train()
    assert error(plain(input_ids=tokens).logits, expected_logits) < 1e-5  # bitsandbytes has another product in eval()


def _train_with_decay(model: nn.Module, tokens: Tensor) -> list[float]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.5)
    losses = []
    for _ in range(4):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


STAYS: dict[str, tuple[dict[str, Any], str]] = {
    "of the weights": ({"init_lora_weights": "olora"}, "nf4"),
    "of a field": ({"lora_bias": True}, "nf4"),
    "of magnitudes": ({"init_lora_weights": False, "use_dora": True}, "nf4"),
    "of the format": ({}, "fp4"),
}


@pytest.mark.parametrize("case", STAYS)
def test_lora_on_4_bits_stays_peft_s(case: str, tiny_llama: Make, tokens: Tensor) -> None:
    """What we do not have: one warning, and PEFT's own model, random numbers included."""
    fields, quant_type = STAYS[case]
    torch.manual_seed(3)
    with pytest.warns(notices.NotTakenOverWarning, match="own, which computes 4-bit layers slower: ") as said:
        ours = get_peft_model(in_4_bits(tiny_llama, quant_type), LoraConfig(r=4, **fields))
    assert [warning.category for warning in said].count(notices.NotTakenOverWarning) == 1
    disable()
    torch.manual_seed(3)
    theirs = get_peft_model(in_4_bits(tiny_llama, quant_type), LoraConfig(r=4, **fields))
    assert type(ours) is type(theirs) is PeftModel
    assert trainable(ours) == trainable(theirs)
    assert_equal(state(ours), state(theirs))


def test_dora_and_dropout_on_4_bits(tiny_llama: Make, tokens: Tensor) -> None:
    """PEFT's losses, and no word about the paper's advice for PiSSA, which PEFT refuses here and we do not."""
    runs = []
    for switch in (enable, disable):
        switch()
        torch.manual_seed(3)
        runs.append(get_peft_model(in_4_bits(tiny_llama), LoraConfig(r=4, use_dora=True)))
    assert isinstance(runs[0], PissaModel)
    losses, expected = (_train_with_decay(model, tokens) for model in runs)
    assert losses == pytest.approx(expected, rel=1e-5)
    enable(said.append)
    assert isinstance(get_peft_model(in_4_bits(tiny_llama), LoraConfig(lora_dropout=0.5)), PissaModel)
    assert isinstance(get_peft_model(in_4_bits(tiny_llama), LoraConfig(init_lora_weights="pissa")), PissaModel)
    assert said[-1].endswith("the quantised base as it is")
