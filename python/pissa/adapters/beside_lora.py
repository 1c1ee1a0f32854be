"""A plain LoRA of PEFT's as one more adapter of a PissaModel: its configuration, or its folder, read as one of ours."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, set_peft_model_state_dict

from pissa.adapters.lora_folder import LoraFolder, open_adapter
from pissa.adapters.vocabulary import vocabulary
from pissa.config import PissaConfig


def as_pissa(config: LoraConfig) -> PissaConfig:
    """Returns our configuration for an adapter that is, and starts, like PEFT's LoRA of this one; or a PissaConfig."""
    if isinstance(config, PissaConfig):
        return copy.deepcopy(config)
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config must be a pissa.PissaConfig or a peft.LoraConfig, got {type(config).__name__} [P011]")
    if config.init_lora_weights is not True:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} is not supported together with a PiSSA adapter: leave it "
            "out, for LoRA's start, or give a pissa.PissaConfig with init"
        )
    if config.target_modules is None and not config.target_parameters:
        raise ValueError(
            "target_modules: got None, for which PEFT has a choice for each family of models; needed: the names, or "
            '"all-linear"'
        )
    return PissaConfig.from_lora(config, init="lora")


def read_plain_lora(folder: Path) -> tuple[PissaConfig, LoraFolder]:
    """Returns a plain LoRA's configuration as one of ours, and the content of its folder."""
    lora = open_adapter(folder)
    if not lora.leaves_base or lora.config["use_dora"]:
        name = "use_dora" if lora.config["use_dora"] else "init_lora_weights"
        raise ValueError(
            f"{lora.config_path} has {name}={lora.config[name]!r}, and such an adapter is a plain LoRA only once it "
            "is converted, or merged: see pissa.convert, peft.PeftModel.merge_and_unload [P064]"
        )
    known = {field.name for field in dataclasses.fields(LoraConfig) if field.init} - {"runtime_config"}
    fields = {name: value for name, value in lora.config.items() if name in known}
    try:
        config = LoraConfig(**fields)
        config.init_lora_weights = True  # the factors are in the file
        return as_pissa(config), lora
    except (TypeError, ValueError) as error:
        raise ValueError(f"{lora.config_path} cannot be used: {error}") from error


def load_factors(model: Any, adapter_name: str, lora: LoraFolder) -> None:
    """Gives an adapter that was just added to a PissaModel the factors of a plain LoRA. It starts from zero."""
    weights = lora.weights
    tensors = {name: weights.read(name) for name in weights.entries}
    for key, table in vocabulary(model, adapter_name).items():
        value = tensors.pop(key, None)  # PEFT saves the base's own in addition to an adapter
        if value is not None and not torch.equal(value, table.value({}).to(value.dtype)):
            raise ValueError(
                f"{weights.path}: {key} is another one than the model's, which all its adapters share: load the "
                "adapter onto its own base, with peft.PeftModel.from_pretrained"
            )
    result = set_peft_model_state_dict(model, tensors, adapter_name)
    if result.unexpected_keys:
        raise ValueError(f"{weights.path}: the model has no place for tensor {result.unexpected_keys[0]}")
