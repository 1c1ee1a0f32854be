"""adapter_config.json of a plain LoRA: checked when it is read, and changed for other ranks."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from pissa.config import default_of, exactly
from pissa.files.json_file import read_object, reading, typed
from pissa.files.messages import shown

PLAIN_LORA = "Needed is the configuration of a plain LoRA, as PEFT writes it"
"""What is said of a file that cannot be used."""

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


_USED: dict[str, Any] = {
    "r": int,
    "lora_alpha": float,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, float] | None,
    "target_parameters": list[str] | None,
    "base_model_name_or_path": str | None,
    "use_rslora": bool,
    "use_dora": bool,
}
"""The types of the fields that are computed with: PEFT's, whose LoraConfig does not check them."""


def read_lora_config(path: Path) -> dict[str, Any]:
    """Reads the file. Fields that it lacks and that are used here have PEFT's defaults.

    Raises:
        ValueError: naming the file and the field, and what is wrong with it; a variant of LoRA that is no plain LoRA.
    """
    with reading(path, PLAIN_LORA):
        config = read_object(path)
        if config.get("peft_type") != "LORA":
            raise ValueError(f"peft_type is {shown(config.get('peft_type'))}; needed: 'LORA'")
        defaults = {field.name: default_of(field) for field in dataclasses.fields(LoraConfig)}
        for name, value in config.items():
            if name not in _KNOWN and value != defaults.get(name) and value not in (None, False, {}, []):
                raise ValueError(f"{name} is {shown(value)}, a variant of LoRA that cannot be converted")
        used = {name: typed(config.get(name, defaults[name]), kind, name) for name, kind in _USED.items()}
        return {"init_lora_weights": defaults["init_lora_weights"]} | config | used


def size_of(config: Mapping[str, Any], target: str) -> tuple[int, float]:
    """The rank and the scaling that a configuration gives a target.

    Raises:
        ValueError, re.error: it gives none, or its patterns are no regular expressions.
    """
    rank_key, alpha_key = (
        get_pattern_key(list(config[name] or {}), target) for name in ("rank_pattern", "alpha_pattern")
    )
    rank: int = (config["rank_pattern"] or {}).get(rank_key, config["r"])
    alpha = (config["alpha_pattern"] or {}).get(alpha_key, config["lora_alpha"])
    if rank < 1:
        raise ValueError(f"the rank of {target} is {rank}; needed: 1 or more")
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
