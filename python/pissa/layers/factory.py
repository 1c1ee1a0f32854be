"""Makes the PissaLayer for a module. A module that cannot be adapted is refused by name."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from pissa.base.classes import adopt, computing_parameters
from pissa.base.protocol import Base
from pissa.base.weights import is_offloaded
from pissa.config import PissaConfig, exactly, is_all_linear
from pissa.distributed import is_data_parallel, is_managed, is_of_an_engine, is_partitioned, is_sharded
from pissa.layers.experts import unfused_experts
from pissa.layers.layer import PissaLayer, pissa_layers
from pissa.layers.modules import LAYER_CLASSES, PissaLinear
from pissa.notices import AllLinearWarning
from pissa.ops.checks import FLOATS
from pissa.peft_private import all_linear, is_refused_by_peft

_log = logging.getLogger(__name__)


def choose_layers(model: nn.Module, config: PissaConfig) -> None:
    """Replaces "all-linear" in a configuration by the names of the layers of `model` that it means. In a model with
    several parts, these are the layers of the language part. Layers whose adapter the model's code would bypass are
    left out. A layer that is too small for `r` gets a lower rank in the configuration's patterns, with the scaling that
    `r` would give. One warning reports both the layers left out of the language part and the lower ranks."""
    if not is_all_linear(config):
        return
    names: Any = all_linear(config, model)
    if part := _language_part(model):
        beside = {name for name in names if not name.startswith(f"{part}.")}
        names = names - beside
        _log.info("target_modules is 'all-linear': only %s is adapted, without %s", part, sorted(beside))
    config.target_modules = names
    layers: dict[str, Any] = {
        name: layer
        for name, layer in model.named_modules()
        if name in names and check_target_module_exists(config, name)
    }
    left_out, small, reports = {}, {}, []
    for name, layer in layers.items():
        # Packed codes have a different shape, and Conv1D has no in_features.
        side = min((layer.in_features, layer.out_features) if hasattr(layer, "in_features") else layer.weight.shape)
        if is_refused_by_peft(config, model, name) or _is_read(model, name):
            left_out[name] = "the code of this model may read their weights without calling an adapter"
        elif _is_of_its_own(layer):
            left_out[name] = f"a {type(layer).__name__} computes in a way of its own"
        elif side < config.r and get_pattern_key(list(config.rank_pattern), name) not in config.rank_pattern:
            small[name] = side
    config.target_modules = names.difference(left_out)
    if small:
        _lower_ranks(config, small)
        name, side = next(iter(small.items()))
        reports.append(
            f"r={config.r} is more than the smaller side of {len(small)} of {len(layers)} layers, {name} the first; "
            f"the rank of each is that side, {side} for the first"
        )
    for why in dict.fromkeys(left_out.values()):
        first, *others = (name for name, reason in left_out.items() if reason == why)
        reports.append(f"{1 + len(others)} of {len(layers)} layers, {first} the first, are left out: {why}")
    if reports:
        warnings.warn(
            f"target_modules is 'all-linear': {'; '.join(reports)}. To choose otherwise give r, rank_pattern, "
            "target_modules or exclude_modules.",
            AllLinearWarning,
            stacklevel=5,  # the caller of pissa.wrap, or of add_adapter
        )


def _language_part(model: Any) -> str | None:
    """The name of the language part of a model that generates text from other media too; None for other models."""
    if not isinstance(model, PreTrainedModel) or not hasattr(model.config, "text_config") or not model.can_generate():
        return None
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder and name), None)


# Layers of a Mamba mixer whose weights are passed to its kernels, in training or (dt_proj) always.
_READ_IN_MAMBA = ("out_proj", "x_proj", "dt_proj")


def _is_read(model: nn.Module, name: str) -> bool:
    """Whether the layer belongs to a Mamba mixer that reads its weight and may not call it."""
    parent, _, leaf = name.rpartition(".")
    mixer = model.get_submodule(parent)
    return leaf in _READ_IN_MAMBA and hasattr(mixer, "A_log") and hasattr(mixer, "D")


def _is_of_its_own(layer: Any) -> bool:
    """Whether the layer has the class of a dense linear layer but computes something else: a router's scores."""
    if isinstance(layer, BaseTunerLayer) or type(layer.weight) is not nn.Parameter or layer.weight.dtype not in FLOATS:
        return False
    return adopt(layer) is None


def _lower_ranks(config: PissaConfig, ranks: dict[str, int]) -> None:
    """Gives the layers these ranks, with the scaling that they would have at the configuration's own rank."""
    alphas = {}
    for name, rank in ranks.items():
        alpha: Any = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), name), config.lora_alpha)
        alphas[exactly(name)] = alpha * math.sqrt(rank / config.r) if config.use_rslora else alpha * rank / config.r
    config.rank_pattern = {exactly(name): rank for name, rank in ranks.items()} | config.rank_pattern
    config.alpha_pattern = alphas | config.alpha_pattern  # the first that matches counts


def layer_factory(model: nn.Module) -> Callable[..., PissaLayer]:
    """Returns `make_layer` for the layers of `model`. A configuration holds it, so it can be pickled."""
    return partial(make_layer, model_dtype=computing_dtype(model))


def computing_dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which a model computes: that of its first dense parameter."""
    dtypes = (
        parameter.dtype
        for name, module in model.named_modules()
        if ".lora_" not in name
        for parameter in computing_parameters(module)
        if type(parameter) is nn.Parameter and parameter.is_floating_point()
    )
    return next(dtypes, torch.get_default_dtype())


def make_layer(
    target: nn.Module, adapter_name: str, config: PissaConfig, *, model_dtype: torch.dtype, **kwargs: Any
) -> PissaLayer:
    """Makes the PissaLayer for `target`, a layer of a model that computes in `model_dtype`, as PEFT calls it. Raises
    TypeError or ValueError that names the layer, why it cannot be adapted, and what to do instead."""
    name = kwargs["target_name"]
    base = _base_for(target, name)
    _check_weight(base, name)
    layer_class = LAYER_CLASSES[base.module_class]
    if config.use_dora and layer_class is not PissaLinear:
        raise TypeError(f"{name} is a {type(target).__name__}; use_dora is for linear layers; {leave_out(name)} [P016]")
    layer = layer_class(target, adapter_name, config, model_dtype=model_dtype, **kwargs)
    layer.base_layer = base.module  # set after construction: PEFT would warn about an unknown layer type
    return layer


def _base_for(target: nn.Module, name: str) -> Base:
    try:
        base = adopt(target)
    except TypeError as error:
        raise TypeError(f"{name} is {error}; {leave_out(name)} [P015]") from None
    if base is not None:
        return base
    class_name = f"{type(target).__module__}.{type(target).__qualname__}"
    if isinstance(target, FSDPModule):
        raise TypeError(
            f"{name} is sharded by its own fully_shard ({class_name}), and PiSSA computes with its weight outside of "
            f"its forward pass: call fully_shard on the blocks of the model instead, or {leave_out(name)} [P050]"
        )
    raise TypeError(
        f"{name} is a {class_name}; PiSSA adapts nn.Linear, Conv1D, nn.Embedding, nn.Conv1d to 3d, bitsandbytes' "
        f"layers and transformers' fused experts; {leave_out(name)} [P015]"
    )


def _check_weight(base: Base, name: str) -> None:
    weight: Any = base.parameter
    if is_of_an_engine(base.module):
        raise TypeError(
            f"the weight of {name} belongs to a DeepSpeed engine, which would not see a new adapter: wrap the model "
            "before deepspeed.initialize. It may have been loaded under zero.Init [P051]"
        )
    # For any other sharded weight, no process can be given a copy with which its module computes.
    if is_sharded(weight) and not (is_partitioned(weight) or (is_managed(base.module) and is_data_parallel(weight))):
        placements, mesh = ", ".join(map(str, weight.placements)), weight.device_mesh
        raise TypeError(
            f"the weight of {name} is a DTensor with the placements {placements} on {mesh}: not one that fully_shard "
            "has sharded over all processes. With a tensor-parallel plan each process computes a part of the product, "
            "and PiSSA decomposes whole weights: load the model without tp_plan, and shard it with fully_shard"
        )
    if base.is_quantised:
        return
    if (type(weight) is not nn.Parameter and not is_sharded(weight)) or weight.dtype not in FLOATS:
        raise TypeError(
            f"the weight of {name} is a {type(weight).__name__} of {weight.dtype}, but PiSSA decomposes "
            "plain float32, bfloat16 and float16 weights: load the model in one of these "
            "(quant then stores it in a quantised format) [P017]"
        )


def check_values(model: nn.Module, adapter_name: str) -> None:
    """Raises ValueError, naming the layer, if its weight is on the meta device, where it has no values to start from. A
    model there can still be given layers, for planning or to be filled later."""
    experts = unfused_experts(model)
    for name, layer in pissa_layers(model, adapter_name).items():
        if not layer.base.parameter.is_meta or is_offloaded(layer.base.module):
            continue
        path, _, weight = name.rpartition(".")
        if (fused := path.rpartition(".")[0]) in experts:
            raise ValueError(
                f"{fused}.{weight} is on the meta device: fused experts cannot be fetched from where accelerate has "
                f"offloaded them; load the model without offloading, or {leave_out(fused)} [P018]"
            )
        raise ValueError(
            f"the weight of {name} is on the meta device and holds no values: load or materialise it first (a model "
            "that accelerate offloads, device_map=..., is fetched layer by layer) [P018]"
        )


def check_parents(model: nn.Module, adapter_name: str) -> None:
    """Raises TypeError, naming the layer, if its parent would compute without calling it, and so without its
    adapter."""
    for name in pissa_layers(model, adapter_name):
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            raise TypeError(
                f"{name} is in a {type(parent).__name__}, which in evaluation computes from the weights of its layers "
                "and would leave the adapter out: call torch.backends.mha.set_fastpath_enabled(False) first, or "
                f"{leave_out(name)} [P020]"
            )
        if name.endswith(".dt_proj") and _is_read(model, name):
            raise TypeError(
                f"{name} is in a {type(parent).__name__}, which multiplies by its weight and never calls it, and would "
                f"leave the adapter out; {leave_out(name)} [P020]"
            )


def leave_out(name: str) -> str:
    """Advice for error messages on how to leave the layer out."""
    return f"leave it out of target_modules or add {name.rpartition('.')[2]!r} to exclude_modules"
