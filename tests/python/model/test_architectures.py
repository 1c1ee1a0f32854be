"""Every architecture, dense and in 4 bits: the start, the function and its gradients, training, files, merging, the way
back to the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import architecture_checks as checks
from architectures import ARCHITECTURES, DAILY, FORMS, SUPPORTED
from daily import each
from oracle import change_all

GENERATING = [name for name, architecture in ARCHITECTURES.items() if architecture.generates]
STORED_DAILY = ("llama3", "mixtral", "gpt_oss", "gpt2")
"""One for each way in which a weight in 4 bits lies in its layer: plain, an expert's, both transposed."""
LIVES = [(name, "implicit") for name in DAILY] + [(name, "nf4") for name in STORED_DAILY]
supported = pytest.mark.parametrize(("name", "form"), each(SUPPORTED, LIVES))
ROUNDED = [(name, "implicit") for name in ("gpt_oss", "mamba", "t5", "resnet")] + [("llama3", "nf4")]
"""Experts and states that are summed in float32, a model that casts to a weight's dtype, convolutions, 4 bits."""
pytestmark = [
    pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning"),
    pytest.mark.filterwarnings("ignore::pissa.notices.AllLinearWarning"),
]


@supported
def test_its_life(name: str, form: str, tmp_path: Path, subtests: pytest.Subtests) -> None:
    life = checks.Life(ARCHITECTURES[name], FORMS[form], tmp_path)
    for check in checks.LIFE:
        with subtests.test(check.__name__):
            check(life)


@pytest.mark.parametrize(("name", "form"), each(SUPPORTED, ROUNDED))
def test_bfloat16_has_the_same_bits(name: str, form: str, tmp_path: Path) -> None:
    """At step 0, restored, and without the adapter."""
    life = checks.Life(ARCHITECTURES[name].in_bfloat16(), FORMS[form], tmp_path)
    checks.check_step_0(life)
    checks.step(life.model, life.batch)
    checks.check_save_and_reload(life)
    checks.check_disable_and_delete(life)


@pytest.mark.parametrize("name", each(GENERATING, ["llama3", "mamba", "whisper"]))
def test_it_generates_what_the_base_does(name: str) -> None:
    """At step 0, with the cache of keys and values, and other tokens once it is trained."""
    architecture = ARCHITECTURES[name]
    prompt = {key: value for key, value in architecture.batch().items() if key not in ("labels", "attention_mask")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model = checks.wrapped(architecture, {})
    expected = architecture.make().generate(**prompt, **options)
    assert torch.equal(model.generate(**prompt, **options), expected)
    change_all(model, size=0.5)
    trained = model.generate(**prompt, **options)
    assert not torch.equal(trained, expected)
    with model.disable_adapter():
        assert torch.equal(model.generate(**prompt, **options), expected)


@pytest.mark.parametrize("form", each(FORMS, ["nf4"]))
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llama4", "mamba", "whisper"])
def test_recomputed_blocks_have_the_same_gradients(name: str, form: str) -> None:
    gradients = []
    for recomputed in (False, True):
        model = checks.wrapped(ARCHITECTURES[name], FORMS[form])
        change_all(model)
        if recomputed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert model.is_gradient_checkpointing
        loss = checks.training_loss(model, ARCHITECTURES[name].batch())
        model.train()  # for what is computed again
        loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    plain, recomputed_ones = gradients
    assert plain.keys() == recomputed_ones.keys()
    assert all(torch.equal(gradient, recomputed_ones[key]) for key, gradient in plain.items())


@pytest.mark.parametrize("name", [name for name, architecture in ARCHITECTURES.items() if architecture.nf4_refused])
def test_four_bits_are_refused_by_the_layers_name(name: str) -> None:
    checks.check_nf4_is_refused(ARCHITECTURES[name])
