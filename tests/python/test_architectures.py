"""Every architecture, dense and in 4 bits: the start, the function and its gradients, training, files, merging, the way
back to the base."""

from __future__ import annotations

from pathlib import Path

import pytest

import architecture_checks as checks
from architectures import ARCHITECTURES

FORMS: dict[str, dict[str, str]] = {"dense": {}, "nf4": {"quant": "nf4"}}
pytestmark = [
    pytest.mark.filterwarnings("ignore:The residual of the base is stored as:UserWarning"),
]

supported = pytest.mark.parametrize(
    ("name", "form"),
    [
        (name, form)
        for name, architecture in ARCHITECTURES.items()
        for form in FORMS
        if form == "dense" or architecture.nf4_refused is None
    ],
)


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
def test_merged_it_is_the_same_up_to_rounding(name: str, form: str) -> None:
    checks.check_merge(ARCHITECTURES[name], FORMS[form])


@supported
def test_without_its_adapter_it_is_the_base(name: str, form: str) -> None:
    checks.check_disable_and_delete(ARCHITECTURES[name], FORMS[form])


@pytest.mark.parametrize("name", [name for name, architecture in ARCHITECTURES.items() if architecture.nf4_refused])
def test_four_bits_are_refused_by_the_layers_name(name: str) -> None:
    checks.check_nf4_is_refused(ARCHITECTURES[name])
