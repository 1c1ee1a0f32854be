"""What becomes of the configurations and folders that programs give to PEFT while `integrations.peft` is enabled."""

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
from torch import nn

from pissa.base.kinds import has_4bit_layers
from pissa.config import PissaConfig, default_of
from pissa.distributed import RankError
from pissa.files.hub import adapter_folder
from pissa.files.pissa_layout import PISSA_RECORD
from pissa.integrations.fused_kernels import refuse_fused_kernels
from pissa.layers.layer import pissa_layers
from pissa.model.inject import restored_on_error, way_back
from pissa.model.pissa_model import PissaModel
from pissa.model.wrap import wrap
from pissa.notices import NotTakenOverWarning

Tell = Callable[[str], None]

# The starts that PEFT draws, and can draw on 4-bit layers. They leave the base what it is.
_DRAWN = (True, False, "gaussian")
_PISSA = re.compile("pissa(_niter_[0-9]+)?")


def made(
    kind: type[nn.Module], model: nn.Module, config: Any, start: str | None, tell: Tell, **kwargs: Any
) -> nn.Module:
    """What `peft.get_peft_model` returns.

    Args:
        kind: the class of PEFT's that it has chosen.
        start: the init of a LoraConfig that says nothing of it; None leaves it LoRA's.
        tell: is called with one sentence if the adapter is taken over.
        kwargs: other arguments of the class.
    """
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        return kind(model, config, **kwargs)
    init = config.init_lora_weights
    if init is True and start is not None:
        return _started(model, config, tell, **kwargs)
    if isinstance(init, str) and _PISSA.fullmatch(init):
        return _as_pissa(kind, model, config, tell, **kwargs)
    if has_4bit_layers(model):
        return _as_lora(kind, model, config, tell, **kwargs)
    return kind(model, config, **kwargs)


def _as_pissa(kind: type[nn.Module], model: nn.Module, config: LoraConfig, tell: Tell, **kwargs: Any) -> nn.Module:
    """PiSSA on a base that stays as it is; PEFT's own if the configuration cannot be ours."""
    try:
        ours = _configuration(_with_targets(config, model))
    except (TypeError, ValueError) as error:
        _warn(config, f"changes the base: {error}")
        return kind(model, config, **kwargs)
    return _wrapped(model, config, ours, tell, **kwargs)


def _started(model: nn.Module, config: LoraConfig, tell: Tell, **kwargs: Any) -> nn.Module:
    """PiSSA of a configuration that says nothing of its start.

    Raises:
        ValueError: a field that is not supported, naming it.
    """
    try:
        ours = _configuration(_with_targets(config, model))
    except (TypeError, ValueError) as error:
        raise ValueError(f"a LoraConfig without a start of its own was to start as PiSSA, but {error}") from None
    return _wrapped(model, config, ours, tell, **kwargs)


def _wrapped(model: nn.Module, config: LoraConfig, ours: PissaConfig, tell: Tell, **kwargs: Any) -> PissaModel:
    wrapped = wrap(model, ours, **kwargs)
    refuse_fused_kernels(wrapped)
    tell(_sentence(config, "PiSSA", wrapped))
    return wrapped


def _as_lora(kind: type[nn.Module], model: nn.Module, config: LoraConfig, tell: Tell, **kwargs: Any) -> nn.Module:
    """LoRA from the factors that PEFT draws, whose places in the model PEFT chooses, too."""
    if (reason := _unsupported(config, model)) is not None:
        _warn(config, f"computes 4-bit layers slower: {reason}")
        return kind(model, config, **kwargs)
    before = torch.get_rng_state()
    with ExitStack() as stack:
        stack.callback(way_back(model))
        plain: Any = kind(model, copy.deepcopy(config), **{**kwargs, "low_cpu_mem_usage": False})
        name = plain.active_adapter
        state = peft.get_peft_model_state_dict(plain, adapter_name=name, save_embedding_layers=False)
        chosen = plain.peft_config[name]
    after = torch.get_rng_state()
    # PEFT's factors are float32, whatever it is told, unless the codes are in a parameter of a float dtype.
    in_float32 = all(value.dtype == torch.float32 for key, value in state.items() if ".lora_" in key)
    try:
        with restored_on_error(model):
            ours = _configuration(chosen, init="lora")
            wrapped = wrap(model, ours, **{**kwargs, "autocast_adapter_dtype": in_float32})
            peft.set_peft_model_state_dict(wrapped, state, adapter_name=name)
    except (TypeError, ValueError, KeyError, RankError) as error:  # on all ranks, if on one
        torch.set_rng_state(before)
        _warn(config, f"computes 4-bit layers slower: {error}")
        return kind(model, config, **kwargs)
    torch.set_rng_state(after)
    tell(_sentence(config, "LoRA with our kernels", wrapped))
    return wrapped


def _unsupported(config: LoraConfig, model: nn.Module) -> str | None:
    """What of the configuration keeps it from being ours, on 4-bit layers."""
    init = config.init_lora_weights
    if init not in _DRAWN:
        return f"init_lora_weights={init!r} starts from the weights"
    if config.use_dora and init is False:
        return "init_lora_weights=False with use_dora starts from magnitudes that are not the base's"
    try:
        _configuration(_with_targets(config, model), init="lora")
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _configuration(config: LoraConfig, **fields: Any) -> PissaConfig:
    """A PissaConfig with the fields of a LoraConfig.

    Raises:
        TypeError, ValueError: a field that is not supported, naming it.
    """
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for field in dataclasses.fields(config):  # a program's own class may have more
        if field.name not in known and getattr(config, field.name) != default_of(field):
            raise ValueError(f"{field.name}={getattr(config, field.name)!r} is not a field of peft.LoraConfig")
    if config.target_modules is None:
        raise ValueError("target_modules is not given, and PEFT has no default for this model")
    return PissaConfig.from_lora(config, **fields)


def _with_targets(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """The configuration with PEFT's default targets if it has none. Ours are others."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    if config.target_modules is not None or config.target_parameters or targets is None:
        return config
    config = copy.copy(config)
    config.target_modules = targets if isinstance(targets, str) else set(targets)
    return config


def loaded(plain: Callable[..., nn.Module], model: nn.Module, model_id: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """What `PeftModel.from_pretrained` returns, whose own is `plain`."""
    config = kwargs.get("config", args[2] if len(args) > 2 else None)
    ours = (config is None or isinstance(config, PissaConfig)) and _is_ours(model_id, **kwargs)
    load = PissaModel.from_pretrained if ours else plain
    return load(model, model_id, *args, **kwargs)


def _is_ours(model_id: Any, **kwargs: Any) -> bool:
    """Whether a folder, or a repository of the Hub, holds an adapter of ours."""
    try:
        return (adapter_folder(model_id, [PISSA_RECORD], **kwargs) / PISSA_RECORD).is_file()
    except ValueError:
        return False  # PEFT says what is wrong


def _sentence(config: LoraConfig, method: str, model: Any) -> str:
    init = config.init_lora_weights
    layers = pissa_layers(model.base_model.model).values()
    quantised = any(layer.base.is_bnb_quantised for layer in layers)
    base = "the base as bitsandbytes has quantised it" if quantised else "the base unchanged"
    return f"LoraConfig(init_lora_weights={init!r}) became {method}: rank {config.r}, {len(layers)} layers, {base}"


def _warn(config: LoraConfig, why: str) -> None:
    warnings.warn(
        f"LoraConfig(init_lora_weights={config.init_lora_weights!r}) stays PEFT's own, which {why}",
        NotTakenOverWarning,
        stacklevel=6,  # the caller of get_peft_model
    )
