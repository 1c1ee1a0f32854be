"""Names of adapters: each is a folder, a key of torch's dictionaries and a part of the names of parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pissa
from language_models import Make, assert_same, logits, snapshot, train
from pissa import PissaConfig, PissaModel

NO_FOLDER = ["", ".", "..", "../x", "a/b", "/tmp/x", "a\\b", "a.b", "a\0b", "a\nb", "\t", "\ud800"]
TOO_LONG = ["x" * 201, "ä" * 101]
NOT_STRINGS = [None, 7, b"a"]
IN_PARAMETERS = ["model", "layers", "0", "q_proj", "weight", "base_layer", "lora_A", "modules_to_save"]
IN_TORCH = ["train", "keys", "type", "training", "_parameters", "__base__"]
REFUSED = [*NO_FOLDER, *TOO_LONG, *NOT_STRINGS, *IN_PARAMETERS, *IN_TORCH]


@pytest.fixture
def saved(small_llama: Make, tokens: Tensor, tmp_path: Path) -> Path:
    model = pissa.wrap(small_llama(), r=2, target_modules=["q_proj"])
    train(model, tokens)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_name_that_could_not_be_saved_is_refused(small_llama: Make, saved: Path) -> None:
    base = small_llama()
    wrapped = pissa.wrap(copy.deepcopy(base), r=2, target_modules=["q_proj"])
    before, wrapped_before = snapshot(base), snapshot(wrapped)
    files = sorted(saved.parent.rglob("*"))
    calls: list[Callable[[Any], Any]] = [
        lambda name: pissa.wrap(base, r=2, adapter_name=name),
        lambda name: PissaModel.from_pretrained(base, saved, adapter_name=name),
        lambda name: wrapped.add_adapter(name, PissaConfig(r=2, target_modules=["q_proj"])),
        lambda name: wrapped.load_adapter(saved, name),
    ]
    for name in REFUSED:
        for call in calls:
            with pytest.raises(ValueError, match=r"adapter_name: got .*(allowed: a string|give another name)"):
                call(name)
        assert_same(base, before.copy())
        assert_same(wrapped, wrapped_before.copy())
    assert sorted(saved.parent.rglob("*")) == files


@pytest.mark.parametrize("name", ["v 2", "übung", "lora", "Model", "x" * 200], ids=ascii)
def test_any_other_name_is_saved_and_restored(name: str, small_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    model = pissa.wrap(small_llama(), r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.add_adapter(name, PissaConfig(r=3, target_modules=["v_proj"], modules_to_save=["lm_head"]))
    expected = {}
    for adapter in ("default", name):
        model.set_adapter(adapter)
        train(model, tokens)
        expected[adapter] = logits(model, tokens)
    model.save_pretrained(tmp_path)
    both = PissaModel.from_pretrained(small_llama(), tmp_path)
    for _ in range(2):  # in the place of itself, too
        both.load_adapter(tmp_path / name, name)
        for adapter, values in expected.items():
            both.set_adapter(adapter)
            assert torch.equal(logits(both, tokens), values)
