"""The plain LoRA that an adapter is to every other runtime: what PEFT's files call its tensors, their shapes, and the
configuration beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pissa.config import PissaConfig, exactly
from pissa.files.expert_layout import adapted_names, places, stack, unstack
from pissa.layers.experts import unfused_experts
from pissa.layers.layer import PissaLayer
from pissa.peft_private import rewritten_by_peft

PREFIX = "base_model.model."

Matrices = tuple[Tensor, Tensor]
"""A factor a [rank, in] and a factor b [out, rank]."""


@dataclass(frozen=True)
class Factors:
    """Two tensors that hold the factors of one layer, or those of a weight of all experts of a module."""

    keys: tuple[str, str]
    layers: Mapping[str, PissaLayer]
    """By their names in the model; more than one are the experts, in order."""

    def pack(self, matrices: Sequence[Matrices]) -> dict[str, Tensor]:
        """The tensors under their names, from the matrices of each layer."""
        (layer, *others) = self.layers.values()
        pair = stack(matrices) if others else layer.as_parameters(*matrices[0])
        return {key: tensor.contiguous() for key, tensor in zip(self.keys, pair, strict=True)}

    def unpack(self, a: Tensor, b: Tensor) -> dict[str, Matrices]:
        """The matrices of each layer, from the tensors."""
        (layer, *others) = self.layers.values()
        matrices = unstack(a, b, len(self.layers)) if others else [layer.as_matrices(a, b)]
        return dict(zip(self.layers, matrices, strict=True))

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The tensors' shapes for factors of that rank."""
        sizes = [layer.matrix_shape for layer in self.layers.values()]
        matrices = [
            (torch.empty(rank, columns, device="meta"), torch.empty(rows, rank, device="meta"))
            for rows, columns in sizes
        ]
        return {key: tuple(tensor.shape) for key, tensor in self.pack(matrices).items()}


def is_of_a_layer(key: str, layers: Iterable[str]) -> bool:
    """Whether a tensor in PEFT's file is a factor, or a base weight, of one of the layers, given by name: not the bias,
    which may be trained beside the adapter (of a merged layer, that of the dense module in the base's place, which is
    the base's own), nor what belongs to `modules_to_save`."""
    kept = key.endswith(".bias") and ".lora_unmerged." not in key
    return not kept and key.startswith(tuple(f"{PREFIX}{name}." for name in layers))


def magnitude_key(layer: str) -> str:
    """What PEFT's file calls the magnitudes [out] of a layer with DoRA, given by its name in the (unwrapped) model."""
    return f"{PREFIX}{layer}.lora_magnitude_vector"


def factors_of(model: nn.Module, layers: Mapping[str, PissaLayer]) -> list[Factors]:
    """The factors of all layers of an adapter, given by their names in the (unwrapped) model."""
    rest, found = dict(layers), []
    for path, experts in unfused_experts(model).items():
        for name, place in places(path, adapted_names(path, experts, layers)).items():
            members = {key: rest.pop(key) for key in (f"{path}.{index}.{name}" for index in range(len(experts)))}
            found.append(_factors(place, members))
    return found + [_factors(name, {name: layer}) for name, layer in rest.items()]


def _factors(place: str, layers: dict[str, PissaLayer]) -> Factors:
    key_a, key_b = next(iter(layers.values())).factor_keys
    return Factors((f"{PREFIX}{place}.{key_a}", f"{PREFIX}{place}.{key_b}"), layers)


# Names of layers that PEFT takes for former names of fused experts' weights in a list of target modules. It finds the
# layers all the same where their weights are listed as target parameters.
_TAKEN_FOR_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def lora_config(
    model: nn.Module, config: PissaConfig, adapter_name: str, layers: Mapping[str, PissaLayer]
) -> LoraConfig:
    """The configuration of the plain LoRA."""
    lora = config.as_lora()
    lora.fan_in_fan_out = any(isinstance(layer.unmerged_base, Conv1D) for layer in layers.values())
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
        exactly(target): 2 * layer.r[adapter_name]
        for target, layer in targets.items()
        if layer.r[adapter_name] != config.r
    }
    lora.alpha_pattern = {
        exactly(target): grow * layer.lora_alpha[adapter_name]
        for target, layer in targets.items()
        if layer.lora_alpha[adapter_name] != config.lora_alpha
    }
    return lora
