"""The plain LoRA that an adapter is to every other runtime: its tensors, its configuration, and how exact it is."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from pissa.config import PissaConfig, exactly
from pissa.files.expert_layout import adapted_names, is_mirrored, places
from pissa.files.peft_layout import ADAPTER_CONFIG, PREFIX, FactorTensors, MirroredTensors
from pissa.layers.experts import FORMER_NAMES, unfused_experts
from pissa.layers.layer import PissaLayer
from pissa.notices import InexactLoraWarning
from pissa.peft_private import rewritten_by_peft


def factors_of(model: nn.Module, layers: Mapping[str, PissaLayer]) -> list[FactorTensors]:
    """The tensors of all layers of an adapter, given by their names in the (unwrapped) model."""
    rest, found = dict(layers), []
    for path, experts in unfused_experts(model).items():
        for name, place in places(path, adapted_names(path, experts, layers)).items():
            members = {key: rest.pop(key) for key in (f"{path}.{index}.{name}" for index in range(len(experts)))}
            found.append(_factors(place, members, is_mirrored(experts.fused)))
    return found + [_factors(name, {name: layer}) for name, layer in rest.items()]


def _factors(place: str, layers: Mapping[str, PissaLayer], mirrored: bool = False) -> FactorTensors:
    layer = next(iter(layers.values()))
    out, columns = layer.matrix_shape
    key_a, key_b = (f"{PREFIX}{place}.{key}" for key in layer.factor_keys)
    if mirrored:
        return MirroredTensors((key_a, key_b), tuple(layers), (out,), columns)
    a, _ = layer.as_parameters(torch.empty(1, columns, device="meta"), torch.empty(out, 1, device="meta"))
    return FactorTensors((key_a, key_b), tuple(layers), tuple(a.shape[1:]), out)


# Names of layers that PEFT takes for former names of fused experts' weights in a list of target modules. It finds the
# layers all the same if their weights are listed as target parameters.
_TAKEN_FOR_EXPERTS = {"gate"}.union(*(names for former in FORMER_NAMES.values() for names in former))


def lora_config(
    model: nn.Module, config: PissaConfig, adapter_name: str, layers: Mapping[str, PissaLayer], times: int = 2
) -> LoraConfig:
    """The configuration of the plain LoRA of so many times the adapter's rank."""
    lora = config.as_lora(times)
    lora.fan_in_fan_out = any(layer.base.kind is Conv1D for layer in layers.values())
    experts = {path: module for path, module in unfused_experts(model).items() if adapted_names(path, module, layers)}
    if not experts and not rewritten_by_peft(lora, model):
        return lora
    modules, parameters = {}, {}
    for name, layer in layers.items():
        path, _, index = name.rpartition(".")[0].rpartition(".")
        leaf = name.rpartition(".")[2]
        if path in experts:
            if index == "0":
                parameters[f"{path}.{leaf}"] = layer
        elif leaf in _TAKEN_FOR_EXPERTS:
            parameters[f"{name}.weight"] = layer
        else:
            modules[name] = layer
    lora.target_modules, lora.target_parameters = sorted(modules), sorted(parameters)
    lora.exclude_modules = lora.layers_to_transform = lora.layers_pattern = None
    lora.lora_dropout = 0.0  # PEFT has none for parameters, and a saved adapter is for inference
    targets = modules | parameters
    grow = lora.lora_alpha / config.lora_alpha
    lora.rank_pattern = {
        exactly(target): times * layer.r[adapter_name]
        for target, layer in targets.items()
        if layer.r[adapter_name] != config.r
    }
    lora.alpha_pattern = {
        exactly(target): grow * layer.lora_alpha[adapter_name]
        for target, layer in targets.items()
        if layer.lora_alpha[adapter_name] != config.lora_alpha
    }
    return lora


def config_text(config: LoraConfig, base_class: type[nn.Module]) -> str:
    """adapter_config.json as PEFT itself writes it for a plain LoRA on a model of that class."""
    auto_mapping = None
    if config.task_type is None:
        auto_mapping = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch, auto_mapping_dict=auto_mapping)
        return Path(scratch, ADAPTER_CONFIG).read_text()


def inexact_lora(forms: Iterable[str]) -> str:
    """What InexactLoraWarning says of an adapter whose base was stored in these forms."""
    return (
        f"The residual of the base is stored as {' and '.join(sorted(forms))}. On the unmodified base, the plain LoRA "
        "lacks the error of that storage, so it is only approximately the function that was trained: Quant(W_res) + BA "
        "!= W + (BA - B0 A0). PissaModel.from_pretrained, on the folder that save_pretrained wrote, restores the "
        "trained function exactly."
    )


def warn_of_inexact_lora(forms: Iterable[str], stacklevel: int) -> None:
    """Warns that the plain LoRA is inexact; `stacklevel` counts from the caller."""
    warnings.warn(inexact_lora(forms), InexactLoraWarning, stacklevel=stacklevel + 1)
