"""PEFT's files of an adapter, which contain it as the plain LoRA that every other runtime sees: the names and shapes of
the tensors, and the configuration."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pissa.base.start import ServedBase
from pissa.config import PissaConfig, exactly
from pissa.containers.recognise import ADAPTER_CONFIG
from pissa.layers.experts import FORMER_NAMES, WEIGHTS, UnfusedExperts, is_transposed, unfused_experts
from pissa.layers.layer import PissaLayer
from pissa.layers.modules import PissaEmbedding
from pissa.ops.low_rank import pad_rank
from pissa.peft_private import is_rewritten_by_peft

ADAPTER_WEIGHTS = "adapter_model.safetensors"

PREFIX = "base_model.model."
"""The prefix that PEFT adds to the names of the (unwrapped) model's modules."""

FACTOR_KEYS = (PissaLayer.factor_keys, PissaEmbedding.factor_keys)
"""The names of the two factors after the layer's: for a layer with a weight matrix or a kernel, and for an
embedding."""
MAGNITUDE = "lora_magnitude_vector"
"""The name of DoRA's magnitudes [out], after the layer's."""

Matrices = tuple[Tensor, Tensor]
"""A factor a [rank, in] and a factor b [out, rank]."""


@dataclass(frozen=True)
class FactorTensors:
    """Two tensors: the factors of one layer or, stacked, those of one weight of all experts in a module. PEFT stacks
    the experts' a to [experts * r, in], one expert after another, and their b to [out, r * experts], with the expert as
    the faster index."""

    keys: tuple[str, str]
    layers: tuple[str, ...]
    """Names in the model. If there are several, they are the experts, in order."""
    row: tuple[int, ...]
    """The shape of a row of factor a: [in], or [in, *kernel] for a convolution."""
    out: int
    mirrored: bool = field(default=False, kw_only=True)
    """Whether PEFT reads the weights as transposed: the factors are bᵀ and aᵀ, with `row` [out], and `out` is in."""

    def pack(self, matrices: Sequence[Matrices]) -> dict[str, Tensor]:
        """The tensors under their names, float32, from the matrices of each layer, which may have any common rank."""
        pairs = [self._turned(pair) for pair in matrices]
        a, b = pairs[0]
        if len(self.layers) > 1:
            a = torch.cat([a for a, _ in pairs])
            b = torch.stack([b for _, b in pairs], dim=-1).flatten(1)
        tensors = a.reshape(-1, *self.row), b.reshape(self.out, -1, *self._point)
        return {key: tensor.float().contiguous() for key, tensor in zip(self.keys, tensors, strict=True)}

    def unpack(self, a: Tensor, b: Tensor) -> dict[str, Matrices]:
        """The matrices of each layer, from the tensors."""
        a, b, count = a.flatten(1), b.flatten(1), len(self.layers)
        pairs = [(a, b)]
        if count > 1:
            a, b = a.reshape(count, -1, a.shape[1]), b.reshape(len(b), -1, count)
            pairs = [(a[index], b[..., index]) for index in range(count)]
        return {layer: self._turned(pair) for layer, pair in zip(self.layers, pairs, strict=True)}

    def _turned(self, pair: Matrices) -> Matrices:
        a, b = pair
        return (b.mT, a.mT) if self.mirrored else pair

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The tensors' shapes for factors of that rank."""
        rows = rank * len(self.layers)
        return dict(zip(self.keys, ((rows, *self.row), (self.out, rows, *self._point)), strict=True))

    @property
    def _point(self) -> tuple[int, ...]:
        """The kernel of factor b, which is one point for a convolution."""
        return (1,) * (len(self.row) - 1)


def factors_of(model: nn.Module, layers: Mapping[str, PissaLayer]) -> list[FactorTensors]:
    """The tensors of all layers of an adapter. The layers are given by their names in the (unwrapped) model."""
    single, tensors = dict(layers), []
    for path, experts in unfused_experts(model).items():
        for name, place in _places(path, adapted_names(path, experts, layers)).items():
            members = {key: single.pop(key) for key in (f"{path}.{index}.{name}" for index in range(len(experts)))}
            tensors.append(_factors(place, members, is_mirrored(experts.fused)))
    return tensors + [_factors(name, {name: layer}) for name, layer in single.items()]


def _factors(place: str, layers: Mapping[str, PissaLayer], mirrored: bool = False) -> FactorTensors:
    layer = next(iter(layers.values()))
    out, columns = layer.matrix_shape
    key_a, key_b = (f"{PREFIX}{place}.{key}" for key in layer.factor_keys)
    if mirrored:
        return FactorTensors((key_a, key_b), tuple(layers), (out,), columns, mirrored=True)
    a, _ = layer.as_parameters(torch.empty(1, columns, device="meta"), torch.empty(out, 1, device="meta"))
    return FactorTensors((key_a, key_b), tuple(layers), tuple(a.shape[1:]), out)


def rank_multiple(layers: Mapping[str, PissaLayer], adapter_name: str, weight: ServedBase = "original") -> int:
    """The rank of an adapter's plain LoRA for that weight, in multiples of the adapter's rank: 1 if that holds the
    factors of all layers, otherwise 2."""
    fits = (layer.starts(adapter_name).rank_on(weight) <= layer.r[adapter_name] for layer in layers.values())
    return 1 if all(fits) else 2


def plain_lora(
    model: nn.Module,
    layers: Mapping[str, PissaLayer],
    adapter_name: str,
    state: Mapping[str, Tensor],
    weight: ServedBase = "original",
) -> dict[str, Tensor]:
    """The factors of an adapter's plain LoRA for that weight, float32, under their names in PEFT's file.

    Args:
        model: the (unwrapped) model.
        layers: the adapter's layers, by their names in it.
        state: a state dict of the PissaModel, which has the differences dA and dB.
    """
    matrices, times = {}, rank_multiple(layers, adapter_name, weight)
    for name, layer in layers.items():
        deltas = layer.deltas_in(state, f"{PREFIX}{name}.", adapter_name)
        factors = layer.starts(adapter_name).factors_on(weight, deltas)
        matrices[name] = pad_rank(*factors, times * layer.r[adapter_name])
    packed: dict[str, Tensor] = {}
    for tensors in factors_of(model, layers):
        packed |= tensors.pack([matrices[name] for name in tensors.layers])
    return packed


def magnitude_key(layer: str) -> str:
    """The name of the magnitudes [out] of a layer with DoRA, given the layer's name in the (unwrapped) model."""
    return f"{PREFIX}{layer}.{MAGNITUDE}"


def base_weight_key(layer: str) -> str:
    """The name of an adapted layer's own weight, which PEFT saves for embeddings and output layers."""
    return f"{PREFIX}{layer}.base_layer.weight"


def is_of_a_layer(key: str, layers: Iterable[str]) -> bool:
    """Whether a tensor is a factor or a base weight of one of the named layers.

    A bias is not, because it may be trained in addition to the adapter. (A merged layer has its bias twice; the one
    under `lora_unmerged` is the layer's.) Nor are the tensors of `modules_to_save`.
    """
    is_bias = key.endswith(".bias") and ".lora_unmerged." not in key
    return not is_bias and key.startswith(tuple(f"{PREFIX}{name}." for name in layers))


def select_trained_beside(
    model: PeftModel, adapter_name: str, layers: Mapping[str, PissaLayer], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors in a model's state dict that an adapter trains in addition to those of its layers (`modules_to_save`,
    tokens and biases), under PEFT's names."""
    of_layers = {f"{PREFIX}{path}.{key}" for path, layer in layers.items() for key in layer.state_keys(adapter_name)}
    state = {key: value for key, value in state.items() if key not in of_layers}
    tensors: dict[str, Tensor] = get_peft_model_state_dict(
        model, state, adapter_name=adapter_name, save_embedding_layers=False
    )
    return tensors


# -- fused experts


def check_uniform(model: nn.Module, factors: Mapping[str, tuple[int, float]]) -> None:
    """Checks that PEFT's layout can hold an adapter with these layers' ranks and scalings: all experts of a module must
    have the same."""
    for path, experts in unfused_experts(model).items():
        for name in experts.names:
            first = factors.get(f"{path}.0.{name}")
            for index in range(1, len(experts)):
                if factors.get(layer := f"{path}.{index}.{name}") != first:
                    raise ValueError(
                        f"layer {layer} is not adapted like {path}.0.{name}; the experts of a module need one rank "
                        "and alpha, or none of them an adapter: see target_modules, rank_pattern, alpha_pattern [P024]"
                    )


def adapted_names(path: str, experts: UnfusedExperts, layers: Container[str]) -> list[str]:
    """The weights of the experts that have an adapter. `layers` names the adapted layers of the model."""
    return [name for name in experts.names if f"{path}.0.{name}" in layers]


def is_mirrored(fused: nn.Module) -> bool:
    """Whether PEFT reads the weights of fused experts as [experts, out, in] although they are [experts, in, out]. Its
    factors are then those of the transposed matrices: bᵀ instead of a, and aᵀ instead of b."""
    return is_transposed(fused) and not getattr(fused, "is_transposed", False)


def _places(path: str, names: Sequence[str]) -> dict[str, str]:
    """The prefix under which PEFT's files store the factors of each adapted weight of an experts module. PEFT wraps the
    module once for each weight, in the order of the parameters; the last wrapper is the outermost."""
    return {name: path + ".base_layer" * (len(names) - 1 - i) for i, name in enumerate(names)}


def weight_at(place: str, names: Collection[str]) -> tuple[str, str] | None:
    """The experts module and the weight whose factors are under a prefix in PEFT's files; None if no adapter of fused
    experts can have such a prefix. `names`: the weights of that module that have an adapter, in any order."""
    path = place.split(".base_layer")[0]
    ordered = [name for name in WEIGHTS if name in names]
    weights = {place: name for name, place in _places(path, ordered).items()}
    return (path, weights[place]) if len(ordered) == len(names) and place in weights else None


# -- the configuration

# Layer names that PEFT mistakes for former names of fused experts' weights in a list of target modules. It still finds
# the layers if their weights are listed as target parameters.
_TAKEN_FOR_EXPERTS = {"gate"}.union(*(names for former in FORMER_NAMES.values() for names in former))


def plain_config(
    model: nn.Module, config: PissaConfig, adapter_name: str, layers: Mapping[str, PissaLayer], times: int
) -> LoraConfig:
    """The configuration of the plain LoRA, which has `times` the adapter's rank."""
    lora = config.as_lora(times)
    lora.fan_in_fan_out = any(layer.base.module_class is Conv1D for layer in layers.values())
    experts = {path: module for path, module in unfused_experts(model).items() if adapted_names(path, module, layers)}
    if not experts and not is_rewritten_by_peft(lora, model):
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
    lora.lora_dropout = 0.0  # PEFT supports none for parameters, and a saved adapter is for inference
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


def plain_config_text(config: LoraConfig, base_class: type[nn.Module]) -> str:
    """adapter_config.json as PEFT itself writes it for a plain LoRA on a model of that class."""
    auto_mapping = None
    if config.task_type is None:
        auto_mapping = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch, auto_mapping_dict=auto_mapping)
        return Path(scratch, ADAPTER_CONFIG).read_text(encoding="utf-8")


def inexact_lora(forms: Iterable[str]) -> str:
    """The text of InexactLoraWarning for an adapter whose base was stored in these forms."""
    return (
        f"The residual of the base is stored as {' and '.join(sorted(forms))}. On the unmodified base, the plain LoRA "
        "lacks the error of that storage, so it is only approximately the function that was trained: Quant(W_res) + BA "
        "!= W + (BA - B0 A0). PissaModel.from_pretrained, on the folder that save_pretrained wrote, restores the "
        "trained function exactly."
    )
