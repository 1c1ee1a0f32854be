"""Every architecture, dense and in 4 bits: the start, the function and its gradients, training, files, merging, the way
back to the base."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import architecture_checks as checks
from architectures import ARCHITECTURES, FORMS, RELOADED, SUPPORTED
from oracle import change_all

supported = pytest.mark.parametrize(("name", "form"), SUPPORTED)
pytestmark = [
    pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning"),
    pytest.mark.filterwarnings("ignore::pissa.notices.AllLinearWarning"),
]


@supported
def test_layers_start_from_their_principal_part(name: str, form: str) -> None:
    checks.check_start(ARCHITECTURES[name], FORMS[form])


@supported
def test_step_0_is_the_base(name: str, form: str) -> None:
    checks.check_step_0(ARCHITECTURES[name], FORMS[form])


@supported
def test_loss_and_gradients_are_those_of_the_definition(name: str, form: str) -> None:
    checks.check_gradients(ARCHITECTURES[name], FORMS[form])


@supported
def test_a_step_lowers_the_loss_and_changes_only_what_is_trained(name: str, form: str) -> None:
    checks.check_training_step(ARCHITECTURES[name], FORMS[form])


@supported
def test_it_is_restored_to_the_bit(name: str, form: str, tmp_path: Path) -> None:
    checks.check_save_and_reload(ARCHITECTURES[name], FORMS[form], tmp_path)


@supported
def test_bfloat16_has_the_same_bits(name: str, form: str, tmp_path: Path) -> None:
    """At step 0, without the adapter, and restored."""
    architecture = ARCHITECTURES[name].in_bfloat16()
    checks.check_step_0(architecture, FORMS[form])
    checks.check_disable_and_delete(architecture, FORMS[form])
    checks.check_save_and_reload(architecture, FORMS[form], tmp_path)


@pytest.mark.parametrize("name", [name for name, architecture in ARCHITECTURES.items() if architecture.generates])
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llama4", "mamba", "whisper"])
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.* is deprecated:FutureWarning")
def test_recomputed_blocks_have_the_same_gradients(name: str, form: str) -> None:
    gradients = []
    for recomputed in (False, True):
        model = checks.wrapped(ARCHITECTURES[name], FORMS[form])
        change_all(model)
        if recomputed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert model.is_gradient_checkpointing
        checks.training_loss(model, ARCHITECTURES[name].batch()).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    plain, recomputed_ones = gradients
    assert plain.keys() == recomputed_ones.keys()
    assert all(torch.equal(gradient, recomputed_ones[key]) for key, gradient in plain.items())


def test_a_new_process_restores_them_to_the_bit(tmp_path: Path) -> None:
    expected = {}
    for index, (name, form) in enumerate(RELOADED):
        architecture = ARCHITECTURES[name]
        model = checks.wrapped(architecture, FORMS[form])
        checks.step(model, architecture.batch())
        model.save_pretrained(tmp_path / str(index))
        expected[str(index)] = checks.output(model, architecture.batch())
    save_file(expected, tmp_path / "expected.safetensors")
    script = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
import architecture_checks as checks
from pissa import PissaModel
from architectures import ARCHITECTURES, RELOADED
folder = Path(sys.argv[1])
torch.manual_seed(12345)
for index, logits in load_file(folder / "expected.safetensors").items():
    architecture = ARCHITECTURES[RELOADED[int(index)][0]]
    model = PissaModel.from_pretrained(architecture.make(), folder / index)
    print(index, torch.equal(checks.output(model, architecture.batch()), logits))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = sorted(done.stdout.splitlines(), key=lambda line: int(line.split()[0]))
    assert lines == [f"{index} True" for index in range(len(RELOADED))], done.stderr


@supported
def test_merged_it_is_the_same_up_to_rounding(name: str, form: str) -> None:
    checks.check_merge(ARCHITECTURES[name], FORMS[form])


@supported
def test_without_its_adapter_it_is_the_base(name: str, form: str) -> None:
    checks.check_disable_and_delete(ARCHITECTURES[name], FORMS[form])


@pytest.mark.parametrize("name", [name for name, architecture in ARCHITECTURES.items() if architecture.nf4_refused])
def test_four_bits_are_refused_by_the_layers_name(name: str) -> None:
    checks.check_nf4_is_refused(ARCHITECTURES[name])
