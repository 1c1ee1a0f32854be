"""The plan of a checkpoint against the model that transformers makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, Interleave, Transpose, WeightConverter

import pissa
from architectures import ARCHITECTURES
from checkpoint_folders import KINDS, change_config, change_tensors, save
from pissa.checkpoints.init import SplitPlan
from pissa.containers.checkpoint import Checkpoint
from pissa.layers.layer import pissa_layers
from pissa.model.pissa_model import model_class


def plan_of(folder: Path, experts: Any = "dense", **fields: Any) -> SplitPlan:
    return SplitPlan(Checkpoint(folder), pissa.PissaConfig(**({"r": 4} | fields)), experts)


def injected(model: nn.Module, **fields: Any) -> dict[str, Any]:
    """The layers that the model in memory gets."""
    config = pissa.PissaConfig(**({"r": 4} | fields))
    return pissa_layers(model_class(config)(model, config, "default").base_model.model)


def assert_planned(plan: SplitPlan, layers: dict[str, Any]) -> None:
    assert plan.layers.keys() == layers.keys()
    for name, layer in plan.layers.items():
        matrix = plan.source.matrix(layer.parts)
        assert torch.equal(matrix, layers[name].base.matrix()), name
        assert (layer.shape, layer.dtype) == (tuple(matrix.shape), matrix.dtype)
        origin = plan.origins[name]
        assert (origin.r, origin.scaling) == (layers[name].r["default"], layers[name].scaling["default"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::pissa.notices.AllLinearWarning")
def test_layers_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    """Names, ranks, and every value: renamed, transposed, stacked, and joined as transformers does it."""
    model = save(kind, tmp_path, torch.bfloat16)
    loaded = type(model).from_pretrained(tmp_path, dtype="auto")
    plan = plan_of(tmp_path)
    assert_planned(plan, injected(loaded))
    parts = {part.tensor for layer in plan.layers.values() for part in layer.parts}
    assert parts.isdisjoint(plan.copied)
    assert parts | {*plan.copied} == {*plan.source.names}
    places = [min(map(plan.source.names.index, unit.tensors)) for unit in plan.units]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "name",
    ["gemma3", "olmoe", "mamba", "mamba2", "qwen2_5_vl", "gemma3, vision-language", "whisper", "modernbert"],
)
@pytest.mark.filterwarnings("ignore::pissa.notices.AllLinearWarning")
def test_layers_of_other_architectures(name: str, tmp_path: Path) -> None:
    model: Any = ARCHITECTURES[name].make()
    model.save_pretrained(tmp_path)
    assert_planned(plan_of(tmp_path), injected(type(model).from_pretrained(tmp_path, dtype="auto")))


def test_a_single_tensor_is_not_copied(tmp_path: Path) -> None:
    save("llama", tmp_path, torch.bfloat16)
    plan = plan_of(tmp_path)
    layer = plan.layers["model.layers.1.mlp.up_proj"]
    assert plan.source.matrix(layer.parts).data_ptr() == plan.source.read(layer.tensors[0]).data_ptr()


def test_choice_and_ranks_are_the_configurations(tmp_path: Path) -> None:
    model = save("llama", tmp_path)
    fields = {
        "target_modules": ["q_proj", "down_proj"],
        "layers_to_transform": [1],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"down_proj": 8},
        "lora_alpha": 6,
        "use_rslora": True,
    }
    plan = plan_of(tmp_path, quant="nf4", **fields)
    assert {*plan.layers} == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}
    assert_planned(plan, injected(model, **fields))
    assert "lm_head" in plan.dense_linears
    assert "model.layers.1.mlp.up_proj" in plan.dense_linears


@pytest.mark.parametrize("has_prefix", [True, False])
def test_a_prefix_is_added_or_taken_away(has_prefix: bool, tmp_path: Path) -> None:
    """As for a model with a head from a checkpoint without one, and the other way round."""
    model: Any = save("llama", tmp_path)
    architecture = "LlamaModel" if has_prefix else "LlamaForCausalLM"
    if not has_prefix:
        model.model.save_pretrained(tmp_path)
    change_config(tmp_path, architectures=[architecture])
    plan = plan_of(tmp_path)
    loaded = getattr(transformers, architecture).from_pretrained(tmp_path, dtype="auto")
    assert_planned(plan, injected(loaded))


@pytest.fixture
def registered() -> Any:
    """Registers a way to load Llama."""
    from transformers import conversion_mapping

    names: list[str] = []

    def register(*converters: WeightConverter) -> None:
        names.append("LlamaForCausalLM")
        register_checkpoint_conversion_mapping(names[-1], list(converters))

    yield register
    for name in names:
        conversion_mapping._checkpoint_conversion_mapping_cache.pop(name)
        conversion_mapping.USER_REGISTERED_MAPPINGS.discard(name)


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """up_proj in two halves; o_proj transposed."""
    found = {}
    for name, value in tensors.items():
        if "up_proj" in name:
            found[name.replace("up_proj", "up_a")], found[name.replace("up_proj", "up_b")] = value.chunk(2)
        elif "o_proj" in name:
            found[name.replace("o_proj", "o_t")] = value.mT
        else:
            found[name] = value
    return found


def test_rows_that_are_joined_and_a_transposed_tensor(tmp_path: Path, registered: Any) -> None:
    save("llama", tmp_path)
    change_tensors(tmp_path, renamed)
    registered(
        WeightConverter(["mlp.up_a.weight", "mlp.up_b.weight"], "mlp.up_proj.weight", [Concatenate(0)]),
        WeightConverter("self_attn.o_t.weight", "self_attn.o_proj.weight", [Transpose(0, 1)]),
    )
    plan = plan_of(tmp_path, quant="nf4")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert_planned(plan, injected(loaded))
    joined = plan.layers["model.layers.0.mlp.up_proj"]
    assert joined.tensors == ["model.layers.0.mlp.up_a.weight", "model.layers.0.mlp.up_b.weight"]
    assert joined.target == joined.name
    assert plan.layers["model.layers.0.self_attn.o_proj"].parts[0].transposed


def test_other_operations_are_refused_by_name(tmp_path: Path, registered: Any) -> None:
    save("llama", tmp_path)
    change_tensors(tmp_path, lambda all_: {name.replace("o_proj", "o_t"): value for name, value in all_.items()})
    registered(WeightConverter("self_attn.o_t.weight", "self_attn.o_proj.weight", [Interleave(0)]))
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.o_proj: .*Interleave.*exclude_modules"):
        plan_of(tmp_path)
    assert "model.layers.0.self_attn.q_proj" in plan_of(tmp_path, exclude_modules=["o_proj"]).layers


def without(name: str) -> Any:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_tensor(name: str, value: torch.Tensor) -> Any:
    return lambda tensors: tensors | {name: value}


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(UP), r"layer model\.layers\.1\.mlp\.up_proj: the checkpoint has no tensor .*exclude_modules"),
        (with_tensor(UP, torch.zeros(128, 32)), r"model\.safetensors: layer .*up_proj is \[128, 32\], .*config"),
        (with_tensor(UP, torch.zeros(64, 64)), r"is \[64, 64\], needed is \[128, 64\]"),
        (with_tensor(UP, torch.zeros(130, 64)), r"is \[130, 64\], needed is \[128, 64\]"),
        (with_tensor(UP, torch.zeros(128, 64, dtype=torch.int8)), r"has no scales beside it"),
    ],
)
def test_damaged_checkpoints(change: Any, words: str, tmp_path: Path) -> None:
    save("llama", tmp_path)
    change_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=words):
        plan_of(tmp_path)


def test_a_missing_expert(tmp_path: Path) -> None:
    save("mixtral", tmp_path)
    change_tensors(tmp_path, without("model.layers.0.block_sparse_moe.experts.2.w3.weight"))
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj needs 4 tensors of a kind, .* has 4 and 3"):
        plan_of(tmp_path)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("qwen2", {"target_modules": ["lm_head"]}, r"weight of layer lm_head is tied to another module's"),
        ("llama", {"target_modules": ["embed_tokens"]}, r"layer model\.embed_tokens is a Embedding.*stays as it is"),
        ("gpt2", {"quant": "nf4"}, r"layer transformer\.h\.0\.attn\.c_attn is a Conv1D, .*leave quant out"),
        ("llama", {"r": 40, "target_modules": ["k_proj"]}, r"rank 40 is too large for layer .*k_proj"),
        ("llama", {"use_dora": True}, r"use_dora=True is not for a checkpoint"),
        ("llama", {"repair": "lora", "quant": "nf4"}, r"repair='lora' is not for a checkpoint.* to pissa\.load"),
        ("llama", {"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not for a checkpoint"),
        ("llama", {"init": "given"}, r"init='given' takes factors from elsewhere"),
        ("mixtral", {"init": "activations", "quant": "nf4"}, r"init='activations' .* experts='nf4' or another init"),
        ("mixtral", {"experts": "nf4"}, r"experts: got 'nf4'; allowed: 'dense', or .* quant=None"),
    ],
)
def test_what_is_refused(kind: str, fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    save(kind, tmp_path)
    with pytest.raises(ValueError, match=words):
        plan_of(tmp_path, **fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"architectures": ["NoSuchModel"]},
            "config.json cannot be read: .* describes no model that transformers .* can build",
        ),
        (
            {"model_type": "no-such-type"},
            "config.json cannot be read: .* describes no model that transformers .* can build",
        ),
    ],
)
def test_configurations_that_cannot_be_used(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    save("llama", tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=words):
        plan_of(tmp_path)


def test_without_a_configuration(tmp_path: Path) -> None:
    save("llama", tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json cannot be read: No such file"):
        plan_of(tmp_path)
