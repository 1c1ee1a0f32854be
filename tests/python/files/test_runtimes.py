"""What we write, as others read it: plain PEFT, transformers, vLLM by the rules of its loader; merged models in plain
transformers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import architecture_checks as checks
import pissa
from architectures import ARCHITECTURES, DAILY, Architecture
from daily import each
from oracle import change_all
from pissa.layers.layer import pissa_layers

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
runtimes = pytest.mark.parametrize("runtime", RUNTIMES)

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


@architectures
@runtimes
def test_others_load_it_onto_the_unmodified_base(runtime: str, name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = trained(architecture, tmp_path)
    other = RUNTIMES[runtime](architecture.make(), tmp_path)
    assert_same_function(other, model, architecture, f"logits of {name} in {runtime}")


@pytest.mark.parametrize("case", BESIDE_EXPERTS)
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
@runtimes
def test_layers_beside_experts_are_not_taken_for_them(runtime: str, name: str, case: str, tmp_path: Path) -> None:
    architecture = dataclasses.replace(ARCHITECTURES[name], fields=BESIDE_EXPERTS[case])
    model = trained(architecture, tmp_path)
    other = RUNTIMES[runtime](architecture.make(), tmp_path)
    assert_same_function(other, model, architecture, f"logits of {name} in {runtime}")


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


@pytest.mark.parametrize("form", [{}, {"quant": "nf4"}])
@pytest.mark.parametrize("name", ["llama3", "mixtral", "deberta_v3"])
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


# ---- vLLM ------------------------------------------------------------------------------------------------------------

LARGEST_RANK = 512  # of the values that max_lora_rank can have


def objections_of_vllm(folder: Path, base: nn.Module) -> list[str]:
    """What vLLM's loader would refuse, or not apply: it reads r, lora_alpha, use_rslora and the features that it lacks
    from the configuration, one scaling for all layers, and takes the layers from the names of the tensors."""
    config = json.loads((folder / "adapter_config.json").read_text())
    objections = [f"{name} is missing" for name in ("r", "lora_alpha", "target_modules") if name not in config]
    refused = {"modules_to_save": None, "use_dora": False, "bias": "none"}
    objections += [
        f"{name}={config[name]}" for name, allowed in refused.items() if (config[name] or allowed) != allowed
    ]
    alphas, ranks = config["alpha_pattern"], config["rank_pattern"]
    objections += [f"rank {rank}" for rank in (config["r"], *ranks.values()) if rank > LARGEST_RANK]
    own = {alphas.get(key, config["lora_alpha"]) / ranks.get(key, config["r"]) for key in {*alphas, *ranks}}
    if own - {config["lora_alpha"] / config["r"]}:
        objections.append("layers with a scaling of their own")
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    tensors = load_file(folder / "adapter_model.safetensors")
    found: dict[str, set[str]] = {}
    for key in tensors:
        name, _, factor = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        found.setdefault(name, set()).add(factor)
        if not (key.startswith("base_model.model.") and key.endswith(".weight") and name in linear):
            objections.append(key)
    objections += [name for name, factors in found.items() if factors != {"lora_A", "lora_B"}]
    return objections


@pytest.mark.parametrize("name", ["gemma2", "phi3"])
@pytest.mark.parametrize("form", [{}, {"quant": "nf4"}, {"rank_pattern": {"o_proj": 7}}, {"use_rslora": True}])
def test_vllm_can_load_it(name: str, form: dict[str, Any], tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    trained(architecture, tmp_path, **form)
    assert objections_of_vllm(tmp_path, architecture.make()) == []


@pytest.mark.parametrize("fields", [{}, {"lora_alpha": 3}, {"use_rslora": True, "lora_alpha": 3}])
def test_vllms_arithmetic_gives_the_function(fields: dict[str, Any], tmp_path: Path) -> None:
    architecture = dataclasses.replace(ARCHITECTURES["llama3"], fields=fields)
    model = trained(architecture, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    base = architecture.make()
    layers = pissa_layers(model.base_model.model, checks.ADAPTER)
    assert len(tensors) == 2 * len(layers)
    with torch.no_grad():
        for name in layers:
            a, b = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
            assert a.shape[0] == b.shape[1] == config["r"] == 8
            base.get_submodule(name).weight.add_(scaling * b @ a)
    assert_same_function(base, model, architecture, "logits with vLLM's arithmetic")


@pytest.mark.parametrize(
    ("fields", "objection"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all", "target_modules": ["q_proj"]}, "bias=all"),
        ({"use_dora": True}, "use_dora"),
        ({"alpha_pattern": {"q_proj": 2}}, "a scaling of their own"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
    ],
)
def test_what_vllm_lacks_is_seen_by_these_rules(fields: dict[str, Any], objection: str, tmp_path: Path) -> None:
    architecture = dataclasses.replace(ARCHITECTURES["qwen2"], fields=fields)
    checks.wrapped(architecture, {}).save_pretrained(tmp_path)
    assert any(objection in found for found in objections_of_vllm(tmp_path, architecture.make()))
