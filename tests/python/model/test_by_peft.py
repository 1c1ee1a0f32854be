"""A PissaConfig that is given to PEFT: the model is what wrap gives."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor, nn
from torch.nn.modules import module as registrations
from transformers import LlamaForSequenceClassification

import pissa
from language_models import EVERY_FORM, Make, assert_same, logits, snapshot, train
from pissa import PissaConfig
from trainers import assert_equal, quiet, state, trainable

TASKS: dict[str | None, type[nn.Module]] = {
    None: peft.PeftModel,
    "CAUSAL_LM": peft.PeftModelForCausalLM,
    "SEQ_CLS": peft.PeftModelForSequenceClassification,
}


def assert_equal_models(ours: Any, wrapped: Any) -> None:
    assert type(ours) is type(wrapped)
    assert {key: type(part) for key, part in ours.named_modules()} == {
        key: type(part) for key, part in wrapped.named_modules()
    }
    assert_equal(state(ours), state(wrapped))
    assert trainable(ours) == trainable(wrapped)
    assert vars(ours).keys() == vars(wrapped).keys()
    assert ours.peft_config == wrapped.peft_config
    assert ours.training == wrapped.training


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@quiet
@pytest.mark.parametrize(
    ("form", "task_type"), [*((form, "CAUSAL_LM") for form in EVERY_FORM), ("nf4", None), ("nf4", "SEQ_CLS")]
)
def test_get_peft_model_gives_what_wrap_gives(
    form: str, task_type: str | None, small_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    """The same class, tensors, configuration, files, and the same losses of a training."""

    def model() -> nn.Module:
        if task_type != "SEQ_CLS":
            return small_llama()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlamaForSequenceClassification(small_llama().config)

    config = PissaConfig(r=4, task_type=task_type, **EVERY_FORM[form])
    ours, wrapped = peft.get_peft_model(model(), config), pissa.wrap(model(), config)
    assert_equal_models(ours, wrapped)
    assert ours.peft_config["default"] is not config
    for name, each in (("ours", ours), ("wrapped", wrapped)):
        each.save_pretrained(tmp_path / name)
    assert files(tmp_path / "ours") == files(tmp_path / "wrapped")
    if task_type != "SEQ_CLS":
        assert train(ours, tokens) == train(wrapped, tokens)
    by_class = TASKS[task_type](model(), PissaConfig(r=4, task_type=task_type, **EVERY_FORM[form]))
    assert type(by_class) is type(wrapped)
    assert isinstance(wrapped, TASKS[task_type])


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_options(autocast: bool, low_cpu_mem_usage: bool, small_llama: Make) -> None:
    config = PissaConfig(r=4, task_type="CAUSAL_LM", quant="nf4")
    ours = peft.get_peft_model(
        small_llama(dtype=torch.bfloat16),
        config,
        adapter_name="mine",
        autocast_adapter_dtype=autocast,
        revision="other",
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    assert config.revision == "other"
    wrapped = pissa.wrap(
        small_llama(dtype=torch.bfloat16), config, adapter_name="mine", autocast_adapter_dtype=autocast
    )
    assert_equal_models(ours, wrapped)
    dtypes = {parameter.dtype for parameter in ours.parameters() if parameter.requires_grad}
    assert dtypes == {torch.float32 if autocast else torch.bfloat16}


def test_a_failure_leaves_the_model_as_it_was(small_llama: Make, tokens: Tensor) -> None:
    model = small_llama()
    expected, before = logits(model, tokens), snapshot(model)
    hooks = dict(registrations._global_module_registration_hooks)

    class Mine(peft.PeftModelForCausalLM):  # type: ignore[misc]
        pass

    for make, error, message in (
        (lambda c: peft.get_peft_model(model, c), ValueError, r"rank 400 is too large for layer model\.layers\.0\."),
        (lambda c: peft.get_peft_model(model, c, mixed=True), ValueError, "'PISSA' is not compatible with the `PeftM"),
        (lambda c: peft.inject_adapter_in_model(c, model), TypeError, r"needs pissa\.wrap\(model, config\)"),
        (lambda c: Mine(model, c), TypeError, "Mine is a class of its own; use pissa.wrap"),
    ):
        with pytest.raises(error, match=message):
            make(PissaConfig(r=400, target_modules=["q_proj"]))
        assert_same(model, dict(before))
    assert dict(registrations._global_module_registration_hooks) == hooks
    assert torch.equal(logits(peft.get_peft_model(model, PissaConfig(r=4)), tokens), expected)


def test_a_model_that_has_an_adapter(small_llama: Make) -> None:
    model = small_llama()
    first = pissa.wrap(model, r=4)
    before = snapshot(first)
    with (
        pytest.warns(UserWarning, match="modify a model with PEFT for a second time"),
        pytest.raises(ValueError, match="the model carries an adapter already"),
    ):
        peft.get_peft_model(model, PissaConfig(r=4))
    assert_same(first, before)


def test_another_model_takes_the_configuration_of_an_adapter(small_llama: Make) -> None:
    """That of a wrapped model knows how to build that model's layers."""
    first = pissa.wrap(small_llama(), r=4)
    second = peft.get_peft_model(small_llama(), first.peft_config["default"])
    assert_equal_models(second, first)
    assert second.peft_config["default"] is not first.peft_config["default"]


@pytest.mark.nightly
def test_only_our_type_of_adapter_is_in_a_table() -> None:
    """In a process that has imported nothing of this package but a name; PEFT's own models are what they were."""
    code = """
import peft, torch
from peft import get_peft_model
tables = [peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING, peft.PEFT_TYPE_TO_TUNER_MAPPING]
before = [dict(table) for table in tables]
classes = [{k: id(v) for k, v in vars(c).items()} for c in (peft.PeftModel, peft.LoraModel)]
from pissa import PissaConfig
assert [{k: id(v) for k, v in vars(c).items()} for c in (peft.PeftModel, peft.LoraModel)] == classes
assert tables[0] == before[0] and {k: v for k, v in tables[1].items() if k != "PISSA"} == before[1]
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), PissaConfig(r=2, target_modules=["0"]))
print(type(model).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "PissaModel\n", done.stderr


def test_a_tuner_that_nobody_starts_leaves_no_hook(small_llama: Make) -> None:
    """As in a program that makes the tuner itself, or in which PEFT fails."""
    hooks = len(registrations._global_module_registration_hooks)
    PEFT_TYPE_TO_TUNER_MAPPING["PISSA"](small_llama(), {"default": PissaConfig(r=4)}, "default")
    gc.collect()
    assert len(registrations._global_module_registration_hooks) == hooks
