"""PEFT's LoRA beside our adapters: its configuration as one of ours, and its folder, loaded."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, set_peft_model_state_dict

from pissa.config import PissaConfig
from pissa.files.lora_folder import LoraFolder, open_adapter
from pissa.files.vocabulary import vocabulary


def as_pissa(config: LoraConfig) -> PissaConfig:
    """The configuration of an adapter of ours that is, and starts, as PEFT's LoRA of this one; a PissaConfig as it is.

    Raises:
        ValueError: naming a field that our adapters do not have, or of which PEFT decides later.
        TypeError: no LoraConfig.
    """
    if isinstance(config, PissaConfig):
        return copy.deepcopy(config)
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config must be a pissa.PissaConfig or a peft.LoraConfig, got {type(config).__name__}")
    if config.init_lora_weights is not True:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} is not supported beside a PiSSA adapter: leave it out, "
            "for LoRA's start, or give a pissa.PissaConfig with init"
        )
    if config.target_modules is None and not config.target_parameters:
        raise ValueError(
            "target_modules: got None, for which PEFT has a choice for each family of models; needed: the names, or "
            '"all-linear"'
        )
    return PissaConfig.from_lora(config, init="lora")


def read_plain_lora(folder: Path) -> tuple[PissaConfig, LoraFolder]:
    """A plain LoRA's configuration as one of ours, and what is in its folder.

    Raises:
        ValueError: naming the file, and the field or tensor that cannot be used.
    """
    found = open_adapter(folder)
    if not found.leaves_base or found.config["use_dora"]:
        name = "use_dora" if found.config["use_dora"] else "init_lora_weights"
        raise ValueError(
            f"{found.config_path} has {name}={found.config[name]!r}, and such an adapter is a plain LoRA only once it "
            "is converted, or merged: see pissa.convert, peft.PeftModel.merge_and_unload"
        )
    known = {field.name for field in dataclasses.fields(LoraConfig) if field.init} - {"runtime_config"}
    fields = {name: value for name, value in found.config.items() if name in known}
    try:
        config = LoraConfig(**fields)
        config.init_lora_weights = True  # the factors are in the file
        return as_pissa(config), found
    except (TypeError, ValueError) as error:
        raise ValueError(f"{found.config_path} cannot be used: {error}") from error


def load_factors(model: Any, adapter_name: str, found: LoraFolder) -> None:
    """Gives an adapter, which a PissaModel has just got, the factors of a plain LoRA: it starts from zero.

    Raises:
        ValueError: tensors that the adapter has no place for, other shapes, or embeddings of another base.
    """
    weights = found.weights
    tensors = {name: weights.read(name) for name in weights.names}
    for key, table in vocabulary(model, adapter_name).items():
        value = tensors.pop(key, None)  # PEFT writes the base's own beside an adapter
        if value is not None and not torch.equal(value, table.value({}).to(value.dtype)):
            raise ValueError(
                f"{weights.path}: {key} is another one than the model's, which all its adapters share: load the "
                "adapter onto its own base, with peft.PeftModel.from_pretrained"
            )
    result = set_peft_model_state_dict(model, tensors, adapter_name)
    if result.unexpected_keys:
        raise ValueError(f"{weights.path}: the model has no place for tensor {result.unexpected_keys[0]}")
