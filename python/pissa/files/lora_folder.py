"""A plain LoRA in a folder, as PEFT writes it, read without a model: what each tensor is, and what it is scaled by."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from pissa.config import exactly
from pissa.files.expert_layout import stack, unstack
from pissa.files.json_file import read_json, shown
from pissa.files.plain_lora import PREFIX, Matrices
from pissa.files.save import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pissa.files.tensor_file import TensorFile
from pissa.ops.checks import FLOATS

_FLOATS = (*FLOATS, torch.float64)

# Bytes; PEFT's own have two thousand.
_SIZE_LIMIT = 10_000_000

# Its square, and the products with factors in float32, are far from float64's limit.
_ALPHA_LIMIT = 2.0**64

# Fields of LoraConfig that may have any value: what they mean is known here, or does not touch the factors.
_KNOWN = frozenset(
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias", "bias"),
        *("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
        *("rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "fan_in_fan_out"),
        *("init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "layer_replication", "runtime_config"),
    }
)

# The suffixes of the two factors of a layer.
_FACTORS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
# What else PEFT trains in a layer; it stays as it is.
_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
_BESIDE = ("lora_B.bias", *_MAGNITUDES)

# Parameters of fused experts, in the order in which transformers registers them.
_EXPERTS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraFactors:
    """Two tensors: the factors of one layer, or those of a weight of all experts of a module."""

    keys: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    target: str
    """What PEFT compares with `rank_pattern`: the layer's name in the model, or that of the experts' parameter."""
    rank: int
    scaling: float
    experts: int = 1

    def unpack(self, a: Tensor, b: Tensor) -> list[Matrices]:
        """The factors as matrices a [rank, in] and b [out, rank]; of each expert."""
        if self.experts > 1:
            return unstack(a, b, self.experts)
        return [(a.flatten(1), b.flatten(1))]

    def pack(self, matrices: Sequence[Matrices]) -> dict[str, Tensor]:
        """The tensors under their names, float32, from matrices of any one rank."""
        (a, b), *others = matrices
        if others:
            a, b = stack(matrices)
        else:  # a convolution's kernel is in a
            a, b = (a.reshape(-1, *self.shapes[0][1:]), b.reshape(len(b), -1, *self.shapes[1][2:]))
        return {key: tensor.float().contiguous() for key, tensor in zip(self.keys, (a, b), strict=True)}


@dataclass(frozen=True)
class LoraFolder:
    """adapter_config.json and the header of adapter_model.safetensors, checked against each other."""

    config: dict[str, Any]
    config_path: Path
    weights: TensorFile
    factors: dict[str, LoraFactors]
    """By target."""

    @staticmethod
    def read(folder: Path) -> LoraFolder:
        """Reads the folder.

        Raises:
            ValueError: naming the file and the field or the tensor, and what is wrong with it.
        """
        if not folder.is_dir():
            raise ValueError(
                f"{folder} is {'not a folder' if folder.exists() else 'missing'}; needed: an adapter's folder"
            )
        if not (folder / ADAPTER_CONFIG).is_file():
            raise ValueError(f"{folder} holds no adapter: there is no {ADAPTER_CONFIG}")
        return LoraFolder.of(folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS)

    @staticmethod
    def of(config_path: Path, weights_path: Path) -> LoraFolder:
        """Reads the two files; as `read`."""
        config = _read_config(config_path)
        weights = TensorFile(weights_path)
        return LoraFolder(config, config_path, weights, _factors(config, config_path, weights))

    @property
    def other_keys(self) -> list[str]:
        """The tensors beside the factors: biases, magnitudes, `modules_to_save`, embeddings."""
        factors = {key for factors in self.factors.values() for key in factors.keys}
        return [name for name in self.weights.names if name not in factors]

    def matrices(self, target: str) -> list[Matrices]:
        """The factors of a target as matrices, float64; of each expert."""
        factors = self.factors[target]
        a, b = (self.weights.read(key).double() for key in factors.keys)
        return factors.unpack(a, b)


def with_sizes(config: Mapping[str, Any], sizes: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """The configuration of a plain LoRA that has, in each target, the given rank and scaling.

    Where all scalings are equal the alphas are in proportion, so that a runtime that reads tensors of any rank but
    knows no patterns scales them right.
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


# ---- adapter_config.json ---------------------------------------------------------------------------------------------


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path, _SIZE_LIMIT)
        if not isinstance(config, dict):
            raise ValueError(f"it holds {shown(config)}; needed: an object")
        return _checked(config)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def _checked(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {shown(config.get('peft_type'))}; needed: 'LORA'")
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(LoraConfig)
    }
    for name, value in config.items():
        if name not in _KNOWN and value != defaults.get(name) and value not in (None, False, {}, []):
            raise ValueError(f"{name} is {shown(value)}, a variant of LoRA that cannot be converted")
    config = {name: defaults[name] for name in _CHECKS} | config
    for name, (valid, needed) in _CHECKS.items():
        if not valid(config[name]):
            raise ValueError(f"{name} is {shown(config[name])}; needed: {needed}")
    return config


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


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
    "r": (_is_rank, "a whole number from 1 on"),
    "lora_alpha": (_is_alpha, "a number of at most 2^64"),
    "rank_pattern": (_is_pattern(_is_rank), "an object of regular expressions and whole numbers from 1 on"),
    "alpha_pattern": (_is_pattern(_is_alpha), "an object of regular expressions and numbers of at most 2^64"),
    "target_parameters": (_is_parameters, 'null or a list of names "module.parameter"'),
    "init_lora_weights": (lambda value: isinstance(value, (bool, str)), "true, false or text"),
    "base_model_name_or_path": _TEXT,
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "fan_in_fan_out": _FLAG,
}


# ---- adapter_model.safetensors ---------------------------------------------------------------------------------------


def _factors(config: dict[str, Any], config_path: Path, weights: TensorFile) -> dict[str, LoraFactors]:
    found: dict[str, LoraFactors] = {}
    for place, keys in _places(weights, config["use_dora"]).items():
        target, fused = _target(place, config, weights)
        rank_key, alpha_key = (
            get_pattern_key(list(config[name] or {}), target) for name in ("rank_pattern", "alpha_pattern")
        )
        rank = (config["rank_pattern"] or {}).get(rank_key, config["r"])
        alpha = (config["alpha_pattern"] or {}).get(alpha_key, config["lora_alpha"])
        shapes = tuple(weights.shape(key) for key in keys)
        experts = shapes[0][0] // rank if fused and shapes[0] else 1
        if not _fit(shapes, experts * rank, fused):
            raise ValueError(
                f"{weights.path}: tensors {shown(keys[0])} {list(shapes[0])} and {shown(keys[1])} {list(shapes[1])} "
                f"are no factors of rank {rank}{' for each expert' if fused else ''}, which {config_path.name} gives "
                "them; that many rows and columns are needed"
            )
        for key, shape in zip(keys, shapes, strict=True):
            weights.expect(key, shape, _FLOATS, f"the adapter of {target}")
        found[target] = LoraFactors(keys, (shapes[0], shapes[1]), target, rank, alpha / _divisor(config, rank), experts)
    if not found:
        raise ValueError(f"{weights.path} holds no factors: no tensor is called lora_A or lora_embedding_A")
    return found


def _fit(shapes: Sequence[tuple[int, ...]], rank: int, fused: bool) -> bool:
    """Whether the shapes are those of factors a [rank, in] and b [out, rank], or of a convolution's, a [rank, in,
    *kernel] and b [out, rank, 1, ...]."""
    a, b = shapes
    if len(a) != len(b) or len(a) < 2 or (fused and len(a) > 2) or 0 in (*a, *b) or set(b[2:]) - {1}:
        return False
    return a[0] == b[1] == rank


def _places(weights: TensorFile, dora: bool) -> dict[str, tuple[str, str]]:
    """The keys of the two factors of each module, by its name in PEFT's file."""
    names = set(weights.names)
    places: dict[str, tuple[str, str]] = {}
    beside: dict[str, str] = {}
    for name in weights.names:
        if ".lora_" not in name:
            continue
        place, _, suffix = name.rpartition(".lora_")
        suffix = f"lora_{suffix}"
        pair = next((pair for pair in _FACTORS if suffix in pair), None)
        if not place.startswith(PREFIX) or (pair is None and suffix not in _BESIDE):
            raise ValueError(
                f"{weights.path}: tensor {shown(name)} is no part of a LoRA that is known here; those are called "
                f"{PREFIX}<layer>.<{', '.join([*_FACTORS[0], *_FACTORS[1], *_BESIDE])}>"
            )
        if pair is None:
            beside[place] = name
            continue
        keys = (f"{place}.{pair[0]}", f"{place}.{pair[1]}")
        if places.setdefault(place, keys) != keys or not names.issuperset(keys):
            raise ValueError(f"{weights.path}: tensor {shown(name)} has no other factor beside it, of {shown(keys)}")
    for place, name in beside.items():
        if place not in places:
            raise ValueError(f"{weights.path}: tensor {shown(name)} belongs to no layer that has factors")
    for place in places if dora else ():
        if not names & {f"{place}.{suffix}" for suffix in _MAGNITUDES}:
            raise ValueError(
                f"{weights.path}: tensor {shown(f'{place}.{_MAGNITUDES[0]}')} is missing, of DoRA (PEFT leaves "
                "magnitudes out when it subtracts the initial adapter: convert the adapter that was trained)"
            )
    return places


def _target(place: str, config: dict[str, Any], weights: TensorFile) -> tuple[str, bool]:
    """What PEFT compares with patterns, and whether it is a parameter of fused experts."""
    path, *wrappers = place.removeprefix(PREFIX).split(".base_layer")
    leaves = {name.rpartition(".")[2] for name in config["target_parameters"] or () if _is_parameter_of(path, name)}
    if leaves == {"weight"} and not wrappers:
        return f"{path}.weight", False
    if not leaves and not wrappers:
        return path, False
    ordered = [name for name in _EXPERTS if name in leaves]
    if any(wrappers) or len(wrappers) >= len(ordered) or leaves - set(ordered):
        raise ValueError(
            f"{weights.path}: the tensors of {shown(place)} are those of a parameter, but of target_parameters "
            f"{sorted(leaves)} belong to that module; known are {', '.join(_EXPERTS)} of fused experts"
        )
    # PEFT wraps the module once for each parameter, and the last wrapper is the outermost.
    return f"{path}.{ordered[len(ordered) - 1 - len(wrappers)]}", True


def _is_parameter_of(path: str, name: str) -> bool:
    parameter = f"{path}.{name.rpartition('.')[2]}"
    return parameter == name or parameter.endswith(f".{name}")
