"""A PissaConfig as JSON, in pissa.json, or alone in adapter_config.json."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from peft import LoraConfig

from pissa.config import PissaConfig, default_of
from pissa.files.messages import read_object, reading, shown

SAVED = "It is not as save_pretrained wrote it: save the adapter again, or take the file from a copy"
"""What is said of a file of ours that cannot be read."""


def config_as_json(config: PissaConfig) -> dict[str, Any]:
    """The fields of ours, and of LoraConfig's those that differ from PEFT's defaults: another PEFT has other fields."""
    peft = {f.name: f for f in dataclasses.fields(LoraConfig)}
    fields = {}
    for f in _config_fields():
        value = getattr(config, f.name)
        if f is not peft.get(f.name) or value != default_of(f):  # `is`: lora_alpha is ours, with its default
            fields[f.name] = sorted(value) if isinstance(value, set) else value
    return fields


def config_from_json(fields: dict[str, Any]) -> PissaConfig:
    """The way back from `config_as_json`.

    Raises:
        ValueError, TypeError: naming the field, what was found and what is allowed.
    """
    known = {f.name for f in _config_fields()}
    for name, value in fields.items():
        if name not in known and not (value is None or value is False or value in ("", [], {})):
            raise ValueError(
                f"config has an unknown field {shown(name)}, with the value {shown(value)}: a later version of pissa "
                "or peft may know it"
            )
    return PissaConfig(**{name: value for name, value in fields.items() if name in known})


def read_config_alone(path: Path) -> PissaConfig | None:
    """The configuration in an adapter_config.json that `PissaConfig.save_pretrained` wrote; None if the file holds
    another configuration.

    Raises:
        ValueError: naming the file and the field, what was found and what is allowed.
    """
    with reading(path, SAVED):
        fields = read_object(path)
        return config_from_json(fields) if {"svd", "svd_passes"} <= fields.keys() else None


def _config_fields() -> list[dataclasses.Field[Any]]:
    """The fields of a configuration; `runtime_config` belongs to one process."""
    return [f for f in dataclasses.fields(PissaConfig) if f.init and f.name != "runtime_config"]
