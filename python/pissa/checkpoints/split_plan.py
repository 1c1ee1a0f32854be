"""What `init` makes of a checkpoint: which of its tensors are layers of an adapter, by the model's configuration alone,
and what lies in the new folder. The model is built on the meta device, without values."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from pissa.base.init_methods import INIT_METHODS
from pissa.base.start import Origin, StartFactors
from pissa.checkpoints.plan import Layer, Plan, Unit, in_order, linear_layers, matrix_shape, new_shards
from pissa.config import PissaConfig
from pissa.files.lora_folder import INITIAL_FOLDER
from pissa.files.model_folder import Composition, Part, meta_model
from pissa.files.peft_layout import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    FactorTensors,
    adapted_names,
    check_uniform,
    factors_of,
    plain_config,
)
from pissa.files.pissa_layout import PISSA_WEIGHTS, TAKEN
from pissa.files.tensor_file import Layout, Source
from pissa.layers.experts import UnfusedExperts, is_transposed, unfused_experts
from pissa.layers.factory import leave_out
from pissa.layers.kinds import PissaLinear
from pissa.layers.layer import PissaLayer, pissa_layers
from pissa.model.inject import own_config
from pissa.model.pissa_model import model_class

DENSE = "dense"

INITIAL_WEIGHTS = f"{INITIAL_FOLDER}/{ADAPTER_WEIGHTS}"
INITIAL_CONFIG = f"{INITIAL_FOLDER}/{ADAPTER_CONFIG}"


@dataclass(frozen=True)
class SplitPlan(Plan):
    """What becomes of a checkpoint whose layers get an adapter."""

    config: PissaConfig
    """As it was given, but with the names of the layers that it means, and with a stored form."""
    configs: dict[str, PissaConfig]
    """By which each layer is split: the same; or, of fused experts, with a residual that stays dense."""
    experts: str
    origins: dict[str, Origin]
    """Of the layers' start factors, by the layers' names."""
    factors: list[FactorTensors]
    """Where the plain LoRA keeps their factors."""
    lora: LoraConfig
    """The configuration of the plain LoRA of the same rank."""
    model_type: type[nn.Module]

    @staticmethod
    def of(source: Source, config: PissaConfig, experts: str = DENSE) -> SplitPlan:
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
        adapted = pissa_layers(base)
        check_uniform(base, {name: (layer.r["default"], layer.scaling["default"]) for name, layer in adapted.items()})
        stacks = unfused_experts(base)
        dense = _dense(config) if stacks and experts == DENSE else config
        configs = {name: dense if _experts_of(name) in stacks else config for name in adapted}
        uses = Counter(id(value) for _, value in base.named_parameters(remove_duplicate=False))
        for name, layer in adapted.items():
            _check_layer(name, layer, configs[name], uses)
        parts = _parts(adapted, stacks, composition)
        layers, origins = {}, {}
        for name, layer in adapted.items():
            shape, dtype = matrix_shape(name, parts[name], source)
            if shape != layer.matrix_shape:
                raise ValueError(
                    f"{source.path_of(parts[name][0].tensor)}: layer {name} is {list(shape)}, needed is "
                    f"{list(layer.matrix_shape)}: config.json belongs to another checkpoint"
                )
            is_expert = _experts_of(name) in stacks
            layers[name] = Layer(name, parts[name], shape, dtype, configs[name].form, is_expert)
            origins[name] = layer.origin("default", configs[name])
        factors = factors_of(base, adapted)
        units = [Unit(pair.keys[0], tuple(layers[name] for name in pair.layers), pair) for pair in factors]
        files = new_shards(source, units)
        initial = {key: shape for pair in factors for key, shape in pair.shapes(origins[pair.layers[0]].r).items()}
        files[INITIAL_WEIGHTS] = _float32(initial)
        if config.quant_iters > 1:
            taken = [_taken_shapes(layer, origins[layer.name].r) for layer in layers.values() if layer.is_packed]
            files[PISSA_WEIGHTS] = _float32({key: shape for shapes in taken for key, shape in shapes.items()})
        return SplitPlan(
            source,
            in_order(source, units),
            files,
            [name for name in linears if name not in layers or not layers[name].is_packed],
            config,
            configs,
            experts,
            origins,
            factors,
            plain_config(base, config, "default", adapted, times=1),
            type(base),
        )

    def taken_tensors(self, layer: Layer, start: StartFactors) -> dict[str, Tensor]:
        """The factors that a layer's residual lacks, if alternations may have found others than those of the start,
        whose rank they have: zeros fill them up."""
        if self.configs[layer.name].quant_iters == 1:
            return {}
        a, b = start.taken
        missing = start.origin.r - len(a)
        pair = functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing))
        return dict(zip(_taken_shapes(layer, start.origin.r), pair, strict=True))


def _taken_shapes(layer: Layer, r: int) -> dict[str, tuple[int, int]]:
    rows, columns = layer.shape
    return {f"{layer.name}.{TAKEN[0]}": (r, columns), f"{layer.name}.{TAKEN[1]}": (rows, r)}


def _float32(shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    return Layout({name: (torch.float32, shape) for name, shape in shapes.items()})


def start_tensors(start: StartFactors) -> list[Tensor]:
    """The tensors of a start of which the record has the fingerprint: the factors, and those taken, if they are
    others."""
    return [start.a0, start.b0, *(start.taken if start.rank_taken else ())]


def _check_config(config: PissaConfig, experts: str) -> None:
    if experts not in (DENSE, config.quant):
        raise ValueError(
            f"experts: got {experts!r}; allowed: {DENSE!r}, or the format of the other layers, quant={config.quant!r}"
        )
    for name in ("modules_to_save", "trainable_token_indices", "use_dora", "use_adalora", "repair", "start_norm"):
        value = getattr(config, name)
        if value and value != "singular":
            raise ValueError(
                f"{name}={value!r} is not for a checkpoint, whose adapter is a plain LoRA on the residual: leave it "
                "out, and give it to the trainer; repair and start_norm, give it to pissa.load with the folder"
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


def _experts_of(name: str) -> str:
    """The module of fused experts in which a layer of this name would be."""
    return name.rpartition(".")[0].rpartition(".")[0]


def _parts(
    layers: Mapping[str, PissaLayer], stacks: Mapping[str, UnfusedExperts], composition: Composition
) -> dict[str, tuple[Part, ...]]:
    """The parts of every layer."""
    found: dict[str, tuple[Part, ...]] = {}
    try:
        for path, experts in stacks.items():
            for leaf in adapted_names(path, experts, layers):
                name = f"{path}.0.{leaf}"
                stack = composition.stack(f"{path}.{leaf}", len(experts), is_transposed(experts.fused))
                found |= {f"{path}.{index}.{leaf}": parts for index, parts in enumerate(stack)}
        for name in [name for name in layers if name not in found]:
            found[name] = composition.matrix(f"{name}.weight", layers[name].base.kind is Conv1D)
    except ValueError as error:
        raise ValueError(f"layer {name}: {error}; {leave_out(name)}") from None
    return found
