"""What we write, as others read it: plain PEFT, transformers; merged models in plain transformers. vLLM is
integrations/test_export_vllm's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import architecture_checks as checks
import pissa
from architectures import ARCHITECTURES, DAILY, Architecture
from daily import each
from oracle import change_all

pytestmark = [
    pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning"),
    pytest.mark.filterwarnings("ignore::pissa.notices.AllLinearWarning"),
]
architectures = pytest.mark.parametrize("name", each(ARCHITECTURES, DAILY))


def with_peft(base: nn.Module, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(base, folder)


def with_transformers(base: nn.Module, folder: Path) -> nn.Module:
    base.load_adapter(str(folder))
    return base.eval()


RUNTIMES: dict[str, Callable[[nn.Module, Path], nn.Module]] = {"peft": with_peft, "transformers": with_transformers}

# Experts are left out, but not the layers beside them that PEFT calls by the names that experts once had.
BESIDE_EXPERTS: dict[str, dict[str, Any]] = {
    "all but the experts": {"exclude_modules": ["experts"]},
    "some names": {"target_modules": ["gate_proj", "q_a_proj"], "exclude_modules": ["experts"]},
    "shared experts": {"target_modules": r".*shared_experts\.(up|down)_proj"},
}


def trained(architecture: Architecture, folder: Path, **form: str) -> checks.PissaModel:
    """An adapter far from its start, saved to `folder`."""
    model = checks.wrapped(architecture, form)
    checks.step(model, architecture.batch())
    change_all(model)
    model.save_pretrained(folder)
    return model


def assert_same_function(other: nn.Module, model: checks.PissaModel, architecture: Architecture, what: str) -> None:
    batch = architecture.batch()
    plain, exact = (checks.definition(architecture, model, batch, t).logits for t in (torch.float32, torch.float64))
    assert not torch.equal(checks.output(architecture.make(), batch), plain)
    checks.assert_as_accurate(checks.output(other, batch), plain, exact, what)


def assert_loaded_by_others(architecture: Architecture, folder: Path, subtests: pytest.Subtests) -> None:
    model = trained(architecture, folder)
    for runtime, load in RUNTIMES.items():
        with subtests.test(runtime):
            assert_same_function(load(architecture.make(), folder), model, architecture, f"logits in {runtime}")


@architectures
def test_others_load_it_onto_the_unmodified_base(name: str, tmp_path: Path, subtests: pytest.Subtests) -> None:
    assert_loaded_by_others(ARCHITECTURES[name], tmp_path, subtests)


@pytest.mark.parametrize("case", BESIDE_EXPERTS)
@pytest.mark.parametrize("name", each(["deepseek_v2", "deepseek_v3"], ["deepseek_v3"]))
def test_layers_beside_experts_are_not_taken_for_them(
    name: str, case: str, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    assert_loaded_by_others(dataclasses.replace(ARCHITECTURES[name], fields=BESIDE_EXPERTS[case]), tmp_path, subtests)


@architectures
def test_a_merged_model_is_one_of_transformers(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = checks.wrapped(architecture, {})
    change_all(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    # Which is not written, and other implementations have other bits.
    eager = {"experts_implementation": "eager"} if hasattr(merged.config, "num_experts_per_tok") else {}
    again = type(merged).from_pretrained(tmp_path, **eager)
    for parameter in again.parameters():  # torch's product with one row has other bits where its weight is not aligned
        parameter.data = parameter.data.clone()
    batch = architecture.batch()
    assert torch.equal(checks.output(again.eval(), batch), checks.output(merged, batch))
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_a_heads_name_is_written_once(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["deberta_v3"]
    given = architecture.config()
    model = pissa.wrap(architecture.make(), **given)
    assert given["modules_to_save"] == ["classifier", "pooler"]
    for _ in range(2):
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["modules_to_save"] == ["classifier", "pooler", "score"]
        model = pissa.PissaModel.from_pretrained(architecture.make(), tmp_path)


@pytest.mark.parametrize(("name", "form"), [("llama3", {"quant": "nf4"}), ("mixtral", {}), ("deberta_v3", {})])
def test_the_same_adapter_is_the_same_files(name: str, form: dict[str, str], tmp_path: Path) -> None:
    for folder in ("one", "other"):
        trained(ARCHITECTURES[name], tmp_path / folder, **form)
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "pissa.json", "pissa.safetensors", "README.md"}
    for file in names:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes(), file
    # Sets, whose order another process would change.
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
