"""Handles the configurations and folders that programs give to PEFT while `integrations.peft` is enabled."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftType
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from pissa.adapters.lora_folder import is_ours
from pissa.adapters.peft_layout import ADAPTER_WEIGHTS
from pissa.base.classes import has_4_bits
from pissa.config import PissaConfig, default_of
from pissa.containers.checkpoint import PISSA_RECORD
from pissa.containers.hub import adapter_folder
from pissa.distributed import RankError
from pissa.layers.layer import pissa_layers
from pissa.model.inject import restored_on_error, way_back
from pissa.model.pissa_model import PissaModel
from pissa.model.tuner import start_at_zero
from pissa.model.wrap import wrap
from pissa.notices import NotTakenOverWarning

# The starts that PEFT draws at random, and can draw on 4-bit layers. They do not change the base.
_DRAWN = (True, False, "gaussian")
_PISSA = re.compile("pissa(_niter_[0-9]+)?")


def make(
    peft_class: type[nn.Module],
    model: nn.Module,
    config: Any,
    start: str | None,
    tell: Callable[[str], None] | None,
    **kwargs: Any,
) -> nn.Module:
    """Returns the result of `peft.get_peft_model`, which has chosen PEFT's class `peft_class` and its arguments.
    `start` and `tell` are those of `peft.enable`."""
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        return peft_class(model, config, **kwargs)
    init = config.init_lora_weights
    is_pissa = isinstance(init, str) and _PISSA.fullmatch(init) is not None
    if is_pissa or (init is True and start is not None):
        try:
            ours = _configuration(config, model)
        except (TypeError, ValueError) as error:
            if is_pissa:
                _warn(config, f"changes the base: {error}")
                return peft_class(model, config, **kwargs)
            raise ValueError(f"a LoraConfig without a start of its own was to start as PiSSA, but {error}") from None
        method, wrapped = "PiSSA", wrap(model, ours, **kwargs)
        refuse_fused_kernels(wrapped)
    elif has_4_bits(model):
        try:
            method, wrapped = "LoRA with our kernels", _as_lora(peft_class, model, config, **kwargs)
        except (TypeError, ValueError, KeyError, RankError) as error:  # on all ranks, if on one
            _warn(config, f"computes 4-bit layers slower: {error}")
            return peft_class(model, config, **kwargs)
    else:
        return peft_class(model, config, **kwargs)
    if tell is not None:
        layers = pissa_layers(wrapped.base_model.model).values()
        is_quantised = any(layer.base.is_quantised for layer in layers)
        base = "the quantised base as it is" if is_quantised else "the base unchanged"
        tell(f"LoraConfig(init_lora_weights={init!r}) became {method}: rank {config.r}, {len(layers)} layers, {base}")
    return wrapped


def _as_lora(peft_class: type[nn.Module], model: nn.Module, config: LoraConfig, **kwargs: Any) -> PissaModel:
    """LoRA from the factors that PEFT draws, in the places that PEFT chooses. On an error, the model and torch's
    generator are restored."""
    init = config.init_lora_weights
    if init not in _DRAWN:
        raise ValueError(f"init_lora_weights={init!r} starts from the weights")
    if config.use_dora and init is False:
        raise ValueError("init_lora_weights=False with use_dora starts from magnitudes that are not the base's")
    _configuration(config, model, init="lora")
    with torch.random.fork_rng(devices=()):
        with ExitStack() as stack:
            stack.callback(way_back(model))
            plain: Any = peft_class(model, copy.deepcopy(config), **{**kwargs, "low_cpu_mem_usage": False})
            name = plain.active_adapter
            state = peft.get_peft_model_state_dict(plain, adapter_name=name, save_embedding_layers=False)
            chosen = plain.peft_config[name]
        drawn = torch.get_rng_state()
        # PEFT's factors are always float32 unless the codes are in a parameter of a float dtype.
        in_float32 = all(value.dtype == torch.float32 for key, value in state.items() if ".lora_" in key)
        with restored_on_error(model):
            ours = _configuration(chosen, model, init="lora")
            wrapped = wrap(model, ours, **{**kwargs, "autocast_adapter_dtype": in_float32})
            start_at_zero(wrapped, name)
            peft.set_peft_model_state_dict(wrapped, state, adapter_name=name)
    torch.set_rng_state(drawn)
    return wrapped


def _configuration(config: LoraConfig, model: nn.Module, **fields: Any) -> PissaConfig:
    """A PissaConfig with the fields of a LoraConfig, and with PEFT's default targets if it has none, because ours
    differ. Raises TypeError or ValueError for a field that is not supported, naming it."""
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for field in dataclasses.fields(config):  # a program's own class may have more
        if field.name not in known and getattr(config, field.name) != default_of(field):
            raise ValueError(f"{field.name}={getattr(config, field.name)!r} is not a field of peft.LoraConfig")
    if config.target_modules is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
        if targets is None or config.target_parameters:
            raise ValueError("target_modules is not given, and PEFT has no default for this model")
        config = copy.copy(config)
        config.target_modules = targets if isinstance(targets, str) else set(targets)
    return PissaConfig.from_lora(config, **fields)


def refuse_fused_kernels(model: nn.Module) -> None:
    """Makes the backward pass raise TypeError, naming the layer, if an adapter of `model` receives a gradient before
    its layer was ever called. The hooks on a layer are removed at its first call.

    axolotl and Unsloth have kernels that compute y = x Wᵀ + s x Aᵀ Bᵀ from `lora_A` and `lora_B` without calling the
    layer. Here these hold dA and dB, which start at 0. Without the start factors, no gradient would ever leave 0.
    """
    for name, layer in pissa_layers(model).items():
        _refuse_fused_kernel(name, layer)


def _refuse_fused_kernel(name: str, layer: nn.Module) -> None:
    def on_call(*_: Any) -> None:
        for handle in handles:
            handle.remove()

    def on_gradient(gradient: Tensor) -> None:
        raise TypeError(
            f"layer {name}: a gradient has come to its lora_A or lora_B, but the layer was not called. A fused kernel "
            "has taken them for the factors of a plain LoRA; they hold the differences from the start factors. Switch "
            "such kernels off (axolotl: lora_mlp_kernel, lora_qkv_kernel, lora_o_kernel and lora_embedding_kernel: "
            "false), or train a plain LoRA on a checkpoint that `pissa init` has split [P039]"
        )

    trained: list[Any] = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    handles = [layer.register_forward_pre_hook(on_call), *(tensor.register_hook(on_gradient) for tensor in trained)]


def load(plain: Callable[..., nn.Module], model: nn.Module, model_id: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """Returns the result of `PeftModel.from_pretrained`, whose original is `plain`: a model of ours for a folder, or a
    repository on the Hub, that contains an adapter of ours, whose plain LoRA nobody has replaced."""
    config = kwargs.get("config", args[2] if len(args) > 2 else None)
    takes = config is None or isinstance(config, PissaConfig)
    if takes:
        try:
            takes = is_ours(adapter_folder(model_id, [PISSA_RECORD, ADAPTER_WEIGHTS], **kwargs))
        except ValueError:
            takes = False  # PEFT reports what is wrong
    return (PissaModel.from_pretrained if takes else plain)(model, model_id, *args, **kwargs)


def _warn(config: LoraConfig, why: str) -> None:
    warnings.warn(
        f"LoraConfig(init_lora_weights={config.init_lora_weights!r}) stays PEFT's own, which {why}",
        NotTakenOverWarning,
        stacklevel=5,  # the caller of get_peft_model
    )
