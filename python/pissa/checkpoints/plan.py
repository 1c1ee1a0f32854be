"""What is to be done with each tensor of a checkpoint: which of them are layers of an adapter, by the model's
configuration alone. The model is built on the meta device, without values."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pissa.base.init_methods import INIT_METHODS
from pissa.base.start import Origin
from pissa.checkpoints.layer import CheckpointLayer, linear_layers, matrix_shape
from pissa.config import PissaConfig
from pissa.files.composition import Composition, Part
from pissa.files.expert_layout import check_uniform
from pissa.files.model_folder import matrix_of, meta_model
from pissa.files.peft_layout import FactorTensors
from pissa.files.plain_lora import factors_of, lora_config
from pissa.files.source import Source
from pissa.layers.experts import UnfusedExperts, is_transposed, unfused_experts
from pissa.layers.factory import leave_out
from pissa.layers.kinds import PissaLinear
from pissa.layers.layer import PissaLayer, pissa_layers
from pissa.model.inject import own_config
from pissa.model.pissa_model import model_class

DENSE = "dense"


@dataclass(frozen=True)
class PlannedLayer(CheckpointLayer):
    """A layer that gets an adapter."""

    origin: Origin
    is_expert: bool
    """Of a fused weight."""

    def matrix(self, source: Source) -> Tensor:
        """The weight: a view of the mapped file, if it has one part."""
        return matrix_of(self.parts, source)

    @property
    def target(self) -> str:
        return self.name if self.is_expert else super().target


@dataclass(frozen=True)
class Plan:
    """What becomes of a checkpoint."""

    source: Source
    config: PissaConfig
    """As it was given, but with the names of the layers that it means, and with a stored form."""
    dense: PissaConfig
    """The same for layers whose residual stays dense if that of the others is quantised."""
    experts: str
    layers: dict[str, PlannedLayer]
    """By their names, in the order in which they lie in the files."""
    factors: list[FactorTensors]
    """Where the plain LoRA keeps their factors."""
    lora: LoraConfig
    """The configuration of the plain LoRA of the same rank."""
    model_type: type[nn.Module]
    dense_linears: list[str]
    """The linear layers of the model that stay dense."""

    @staticmethod
    def of(source: Source, config: PissaConfig, experts: str = DENSE) -> Plan:
        """The plan for a checkpoint. `config` with neither `quant` nor `residual` stands for
        residual="explicit".

        Args:
            experts: how the residual of fused experts is kept if that of other layers is quantised: "dense", as in the
                checkpoint; or in the same format, which it names, each expert by itself.

        Raises:
            ValueError, TypeError: no such model; a layer that cannot be split, naming it, or whose tensor the
                checkpoint lacks; what a plain LoRA on a residual cannot hold.
        """
        config = own_config(config)
        if config.quant is None and config.residual is None:
            config.residual = "explicit"
        _check_config(config, experts)
        model = meta_model(source.folder)
        if getattr(model.config, "quantization_config", None):
            raise ValueError(
                f"{source.folder} is quantised already (quantization_config in config.json); needed: the checkpoint in "
                "16 or 32 bits"
            )
        composition = Composition(model, source.names)
        linears = linear_layers(model)
        if config.task_type is None and type(model).__name__.endswith("ForCausalLM"):
            config.task_type = "CAUSAL_LM"
        wrapped = model_class(config)(model, config, "default")
        if config.modules_to_save:
            raise ValueError(
                f"modules_to_save={config.modules_to_save}, given or by task_type={config.task_type!r}, is trained "
                "whole, and begins with the training: leave it out here, and name it to the trainer"
            )
        base = wrapped.base_model.model
        layers = pissa_layers(base)
        check_uniform(base, {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()})
        inside = unfused_experts(base)
        dense = _dense(config) if inside and experts == DENSE else config
        uses = Counter(id(value) for _, value in base.named_parameters(remove_duplicate=False))
        configs = {name: dense if _module_of(name) in inside else config for name in layers}
        for name, layer in layers.items():
            _check_layer(name, layer, configs[name], uses)
        parts = _parts(layers, inside, composition)
        planned = [
            _planned(name, layer, parts[name], configs[name], source, _module_of(name) in inside)
            for name, layer in layers.items()
        ]
        places = {name: number for number, name in enumerate(source.names)}
        planned.sort(key=lambda layer: (places[layer.parts[0].tensor], layer.parts[0].member or 0))
        packed = {layer.name for layer in planned if layer.is_packed}
        return Plan(
            source,
            config,
            dense,
            experts,
            {layer.name: layer for layer in planned},
            factors_of(base, layers),
            lora_config(base, config, "default", layers, times=1),
            type(base),
            [name for name in linears if name not in packed],
        )

    def config_of(self, layer: PlannedLayer) -> PissaConfig:
        """The configuration by which a layer is split."""
        return self.config if layer.form == self.config.form else self.dense

    @property
    def copied(self) -> list[str]:
        """The tensors that no layer has a part of."""
        parts = {part.tensor for layer in self.layers.values() for part in layer.parts}
        return [name for name in self.source.names if name not in parts]

    @property
    def has_packed_experts(self) -> bool:
        """Whether the residuals of fused experts are in codes."""
        return any(layer.is_expert and layer.is_packed for layer in self.layers.values())


def _check_config(config: PissaConfig, experts: str) -> None:
    if experts not in (DENSE, config.quant):
        raise ValueError(
            f"experts: got {experts!r}; allowed: {DENSE!r}, or the format of the other layers, quant={config.quant!r}"
        )
    for name in ("modules_to_save", "trainable_token_indices", "use_dora", "use_adalora", "repair"):
        if value := getattr(config, name):
            raise ValueError(
                f"{name}={value!r} is not for a checkpoint, whose adapter is a plain LoRA on the "
                "residual: leave it out, and give it to the trainer"
            )
    if config.start_norm != "singular":
        raise ValueError(
            f"start_norm={config.start_norm!r} is not for a checkpoint, whose adapter is a plain LoRA on the residual, "
            "and starts from what that lacks: leave it out, and give it to pissa.load with the folder"
        )
    if INIT_METHODS[config.init].needs:
        raise ValueError(f"init={config.init!r} takes its factors from elsewhere, and cannot start from a checkpoint")
    if config.residual == "implicit":
        raise ValueError(
            'residual="implicit" leaves the weights as they are, so there is nothing to write: load the model and call '
            "pissa.wrap"
        )


def _dense(config: PissaConfig) -> PissaConfig:
    """The configuration of layers whose residual stays dense, whatever that of the others is."""
    if config.init == "loftq":
        raise ValueError(
            "init='loftq' starts from the error of the format, which a dense residual, as that of fused experts, has "
            f"not: give experts={config.quant!r} or another init, or leave the experts out with exclude_modules"
        )
    changed: dict[str, Any] = {"quant": None, "quant_iters": 1, "residual": "explicit"}
    return config if config.quant is None else dataclasses.replace(config, **changed)


def _check_layer(name: str, layer: PissaLayer, config: PissaConfig, uses: Counter[int]) -> None:
    """Raises ValueError if the layer's residual cannot be kept as `config` says in a checkpoint."""
    module, form = layer.base.module, config.form
    if not isinstance(layer, PissaLinear):
        raise ValueError(
            f"layer {name} is a {type(module).__name__}, whose weight stays as it is in every form; {leave_out(name)}"
        )
    if form.kind != "explicit" and layer.base.kind is Conv1D:
        raise ValueError(
            f"layer {name} is a Conv1D, which transformers cannot load in {form.kind} as it would have to be kept: "
            f"leave quant out, or {leave_out(name)}"
        )
    if uses[id(layer.base.parameter)] > 1:
        raise ValueError(
            f"the weight of layer {name} is tied to another module's, which would get the residual too; "
            f"{leave_out(name)}"
        )


def _module_of(name: str) -> str:
    """The module of fused experts in which a layer of this name would be."""
    return name.rpartition(".")[0].rpartition(".")[0]


def _parts(
    layers: Mapping[str, PissaLayer], inside: Mapping[str, UnfusedExperts], composition: Composition
) -> dict[str, tuple[Part, ...]]:
    """The parts of every layer."""
    stacks: dict[str, list[tuple[Part, ...]]] = {}
    found = {}
    for name, layer in layers.items():
        path, leaf = name.rpartition(".")[::2]
        path, index = path.rpartition(".")[::2]
        try:
            if path not in inside:
                found[name] = composition.matrix(f"{name}.weight", layer.base.kind is Conv1D)
                continue
            key = f"{path}.{leaf}"
            if key not in stacks:
                experts = inside[path]
                stacks[key] = composition.stack(key, len(experts), is_transposed(experts.fused))
            found[name] = stacks[key][int(index)]
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}; {leave_out(name)}") from None
    return found


def _planned(
    name: str,
    layer: PissaLayer,
    parts: tuple[Part, ...],
    config: PissaConfig,
    source: Source,
    is_expert: bool,
) -> PlannedLayer:
    shape, dtype = matrix_shape(name, parts, source)
    if shape != layer.matrix_shape:
        raise ValueError(
            f"{source.entry(parts[0].tensor).path}: layer {name} is {list(shape)}, needed is "
            f"{list(layer.matrix_shape)}: config.json belongs to another checkpoint"
        )
    return PlannedLayer(name, parts, shape, dtype, config.form, layer.origin("default", config), is_expert)
