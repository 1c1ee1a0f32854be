"""adapter_config.json of a plain LoRA: checked when it is read, and changed for other ranks."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from pissa.config import default_of, exactly
from pissa.files.json_file import read_json
from pissa.files.messages import printable, shown

_SIZE_LIMIT = 10_000_000
"""Bytes; PEFT's own have two thousand."""

_RANK_LIMIT = 2**31
"""More than any weight has rows."""

_ALPHA_LIMIT = 2.0**64
"""Its square, and the products with factors in float32, are far from float64's limit."""

# Fields of LoraConfig that may have any value: we know their meaning, or they do not touch the factors.
_KNOWN = frozenset(
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias", "bias"),
        *("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
        *("rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "fan_in_fan_out"),
        *("init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "layer_replication", "runtime_config"),
    }
)


def read_lora_config(path: Path) -> dict[str, Any]:
    """Reads the file. Fields that it lacks and that are used here have PEFT's defaults.

    Raises:
        ValueError: naming the file and the field, and what is wrong with it; a variant of LoRA that is no plain LoRA.
    """
    try:
        config = read_json(path, _SIZE_LIMIT)
        if not isinstance(config, dict):
            raise ValueError(f"it holds {shown(config)}; needed: an object")
        return _checked(config)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {printable(error)}") from error


def size_of(config: Mapping[str, Any], target: str) -> tuple[int, float]:
    """The rank and the scaling that a configuration gives a target."""
    rank_key, alpha_key = (
        get_pattern_key(list(config[name] or {}), target) for name in ("rank_pattern", "alpha_pattern")
    )
    rank: int = (config["rank_pattern"] or {}).get(rank_key, config["r"])
    alpha = (config["alpha_pattern"] or {}).get(alpha_key, config["lora_alpha"])
    return rank, alpha / _divisor(config, rank)


def with_sizes(config: Mapping[str, Any], sizes: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """The configuration of a plain LoRA that has, in each target, the given rank and scaling.

    If all scalings are equal the alphas are in proportion to the ranks. A runtime that reads tensors of any rank but
    knows no patterns then scales them right.
    """
    wanted = {target: (rank, _alpha(config, rank, scaling)) for target, (rank, scaling) in sizes.items()}
    (r, alpha), _ = Counter(wanted.values()).most_common(1)[0]
    patterns = {exactly(target): size for target, size in wanted.items()}
    return {
        **config,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {pattern: size[0] for pattern, size in patterns.items() if size[0] != r},
        "alpha_pattern": {pattern: size[1] for pattern, size in patterns.items() if size[1] != alpha},
        "init_lora_weights": True,
        **dict.fromkeys(["eva_config", "corda_config", "lora_ga_config"] & config.keys()),
        "inference_mode": True,
    }


def _alpha(config: Mapping[str, Any], rank: int, scaling: float) -> float:
    alpha = scaling * _divisor(config, rank)
    near = round(alpha)  # 16 rather than 15.999999999999998
    return near if abs(alpha - near) <= 4 * sys.float_info.epsilon * abs(alpha) else alpha


def _divisor(config: Mapping[str, Any], rank: int) -> float:
    return math.sqrt(rank) if config["use_rslora"] else rank


def _checked(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {shown(config.get('peft_type'))}; needed: 'LORA'")
    defaults = {field.name: default_of(field) for field in dataclasses.fields(LoraConfig)}
    for name, value in config.items():
        if name not in _KNOWN and value != defaults.get(name) and value not in (None, False, {}, []):
            raise ValueError(f"{name} is {shown(value)}, a variant of LoRA that cannot be converted")
    config = {name: defaults[name] for name in _CHECKS} | config
    for name, (valid, needed) in _CHECKS.items():
        if not valid(config[name]):
            raise ValueError(f"{name} is {shown(config[name])}; needed: {needed}")
    return config


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _RANK_LIMIT


def _is_alpha(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _ALPHA_LIMIT


def _is_pattern(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        value is None or (isinstance(value, dict) and all(map(valid, value.values())) and all(map(_is_regex, value)))
    )


def _is_regex(text: str) -> bool:
    try:
        re.compile(rf"(.*\.)?({text})$")  # as PEFT does
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _is_parameters(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) and "." in name for name in value))


_FLAG: tuple[Callable[[Any], bool], str] = (lambda value: isinstance(value, bool), "true or false")
_TEXT: tuple[Callable[[Any], bool], str] = (lambda value: value is None or isinstance(value, str), "null or text")
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number from 1 to 2^31"),
    "lora_alpha": (_is_alpha, "a number of at most 2^64"),
    "rank_pattern": (_is_pattern(_is_rank), "an object of regular expressions and whole numbers from 1 to 2^31"),
    "alpha_pattern": (_is_pattern(_is_alpha), "an object of regular expressions and numbers of at most 2^64"),
    "target_parameters": (_is_parameters, 'null or a list of names "module.parameter"'),
    "init_lora_weights": (lambda value: isinstance(value, (bool, str)), "true, false or text"),
    "base_model_name_or_path": _TEXT,
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "fan_in_fan_out": _FLAG,
}
