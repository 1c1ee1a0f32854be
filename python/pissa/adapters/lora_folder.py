"""Reads an adapter's folder, whoever wrote it, without a model: its kind, and the plain LoRA in it in PEFT's layout."""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from pissa import notices
from pissa.adapters.peft_layout import (
    ADAPTER_WEIGHTS,
    FACTOR_KEYS,
    MAGNITUDE,
    PREFIX,
    FactorTensors,
    Matrices,
    weight_at,
)
from pissa.adapters.pissa_layout import MARK, PISSA_WEIGHTS, PissaFolder, has_ours, is_export_ours, say_replaced
from pissa.config import SUPPORTED, default_of, exactly
from pissa.containers.checkpoint import INITIAL_FOLDER
from pissa.containers.messages import file_errors, quote, read_object
from pissa.containers.recognise import ADAPTER_CONFIG, check_adapter, has_adapter
from pissa.containers.tensor_file import SAVED_FLOATS, TensorFile
from pissa.layers.experts import WEIGHTS as EXPERT_WEIGHTS
from pissa.ops.checks import check_scaling

PLAIN_LORA = "Needed is the configuration of a plain LoRA, as PEFT writes it"
"""The advice for an adapter_config.json that cannot be used."""

INITIAL_WEIGHTS = f"{INITIAL_FOLDER}/{ADAPTER_WEIGHTS}"
"""The adapter before training in the folder of a residual model."""

# PEFT has used both names for magnitudes.
_MAGNITUDES = (MAGNITUDE, f"{MAGNITUDE}.weight")
# Other tensors that PEFT trains in a layer; they are copied unchanged.
_BESIDE = ("lora_B.bias", *_MAGNITUDES)


@dataclass(frozen=True)
class LoraFactors(FactorTensors):
    """The factors of one target, with their rank and scaling. A target is a layer, or one weight of all a module's
    experts."""

    target: str
    """The name that PEFT compares with `rank_pattern`: the layer's name in the model, or that of the experts'
    parameter."""
    rank: int
    scaling: float

    @property
    def is_fused(self) -> bool:
        """Whether they belong to a weight of fused experts."""
        path, _, leaf = self.target.rpartition(".")
        return self.layers[0] == f"{path}.0.{leaf}"

    @property
    def is_embedding(self) -> bool:
        """Whether they belong to an embedding, whose weight [in, out] is a transposed matrix."""
        return self.keys[0].endswith(FACTOR_KEYS[1][0])


@dataclass(frozen=True)
class LoraFolder:
    """adapter_config.json and the header of adapter_model.safetensors, checked against each other and against
    the record in pissa.safetensors. `open_adapter` reads them."""

    path: Path
    config: dict[str, Any]
    """The fields of adapter_config.json. Those that are used here are always present."""
    weights: TensorFile
    factors: dict[str, LoraFactors]
    """The factors by target."""
    ours: PissaFolder | None
    """The pissa adapter whose plain LoRA this is."""

    @property
    def config_path(self) -> Path:
        """The path of adapter_config.json."""
        return self.path / ADAPTER_CONFIG

    @property
    def leaves_base(self) -> bool:
        """Whether the adapter's start has left the base unchanged."""
        return self.config["init_lora_weights"] in (True, False, "gaussian", "eva", "orthogonal")

    @property
    def named_base(self) -> str | None:
        """The model that the adapter names as its base, a folder or a name on the Hub."""
        return self.config["base_model_name_or_path"] or None

    @property
    def other_keys(self) -> list[str]:
        """The other tensors: biases, magnitudes, `modules_to_save`, embeddings."""
        factors = {key for factors in self.factors.values() for key in factors.keys}
        return [name for name in self.weights.entries if name not in factors]

    def matrices(self, target: str) -> list[Matrices]:
        """The factors of a target as float64 matrices, for each expert."""
        factors = self.factors[target]
        a, b = (self.weights.read(key).double() for key in factors.keys)
        return list(factors.unpack(a, b).values())


def is_plain_lora(folder: Path) -> bool:
    """Whether the folder contains a PEFT adapter and none of ours, not even a damaged part of one; or one of ours whose
    plain LoRA another program has replaced."""
    return has_adapter(folder) and not is_ours(folder)


def is_ours(folder: Path) -> bool:
    """Whether the folder contains an adapter of ours, or a part of one, whose plain LoRA no other program has
    replaced."""
    return has_ours(folder) and is_export_ours(folder)


def open_adapter(folder: Path) -> LoraFolder:
    """Determines what an adapter's folder is. No other code does. A folder of ours whose plain LoRA another program has
    replaced is that plain LoRA, with a warning."""
    check_adapter(folder)
    config, weights = read_lora_config(folder / ADAPTER_CONFIG), TensorFile(folder / ADAPTER_WEIGHTS)
    factors = _factors(config, folder / ADAPTER_CONFIG, weights)
    ours = None
    if has_ours(folder) and MARK not in weights.metadata:
        warnings.warn(say_replaced(folder), notices.ReplacedLoraWarning, stacklevel=3)
    elif has_ours(folder):  # the LoRA must be that of this record
        ours = PissaFolder.open(folder)
        weights.expect_checksums()
        if weights.metadata[MARK] != ours.tensors.digest:
            raise ValueError(
                f"{weights.path} is not that of {PISSA_WEIGHTS}, because saving was interrupted, or it is from another "
                "folder. Load the adapter by PissaModel.from_pretrained, which does not need it, and save that [P058]"
            )
        times = 2 if any(layer.has_b0 for layer in ours.layers.values()) else 1
        check_same_layers(
            f"{folder}: the files do not belong together",
            f"in {ADAPTER_CONFIG}",
            {name: rank_and_scaling(pair.rank, pair.scaling) for pair in factors.values() for name in pair.layers},
            f"in {PISSA_WEIGHTS}",
            {name: rank_and_scaling(times * layer.r, layer.scaling) for name, layer in ours.layers.items()},
        )
    return LoraFolder(folder, config, weights, factors, ours)


def check_same_layers(what: str, here: str, ours: Mapping[str, str], there: str, theirs: Mapping[str, str]) -> None:
    """Raises ValueError, naming the first layer that differs, unless an adapter has the same layers in two places.
    Their sizes are given as text."""
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            here, there = (
                f"{sizes.get(name, 'no factors')} {where}" for sizes, where in ((ours, here), (theirs, there))
            )
            raise ValueError(f"{what}: layer {quote(name)} has {here}, and {there}")


def rank_and_scaling(rank: int, scaling: float) -> str:
    """The text of a layer that `check_same_layers` compares. Scalings may differ by float64 roundings."""
    return f"rank {rank} and scaling {scaling:.12g}"


# -- the configuration

# Fields of LoraConfig that may have any value: either their meaning is known, or they do not affect the factors.
_KNOWN = SUPPORTED | {
    *("lora_bias", "init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "layer_replication"),
    "runtime_config",
}

_USED: dict[str, Any] = {
    "r": int,
    "lora_alpha": int | float,
    "rank_pattern": dict | None,
    "alpha_pattern": dict | None,
    "target_parameters": list | None,
    "base_model_name_or_path": str | None,
    "use_rslora": bool,
    "use_dora": bool,
    "init_lora_weights": object,
}
"""The types of the fields that are used here, which PEFT's LoraConfig does not check."""


def read_lora_config(path: Path) -> dict[str, Any]:
    """Reads adapter_config.json. Missing fields that are used here get PEFT's defaults."""
    with file_errors(path, PLAIN_LORA):
        config = read_object(path)
        if config.get("peft_type") != "LORA":
            raise ValueError(f"peft_type is {quote(config.get('peft_type'))}; needed: 'LORA'")
        defaults = {field.name: default_of(field) for field in dataclasses.fields(LoraConfig)}
        for name, value in config.items():
            if name not in _KNOWN and value != defaults.get(name) and value not in (None, False, {}, []):
                raise ValueError(f"{name} is {quote(value)}, a variant of LoRA that cannot be converted [P070]")
        config = {name: defaults[name] for name in _USED} | config
        for name, expected in _USED.items():
            if not isinstance(config[name], expected):
                raise ValueError(f"{name} is {quote(config[name])}, which PEFT does not write")
        return config


def size_of(config: Mapping[str, Any], target: str) -> tuple[int, float]:
    """The rank and scaling of a target in a configuration. To be called in a block of `file_errors`."""
    ranks, alphas = config["rank_pattern"] or {}, config["alpha_pattern"] or {}
    rank: int = ranks.get(get_pattern_key(list(ranks), target), config["r"])
    alpha = alphas.get(get_pattern_key(list(alphas), target), config["lora_alpha"])
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"the rank of {target} is {quote(rank)}; needed: 1 or more")
    scaling = alpha / _divisor(config, rank)
    check_scaling(scaling)
    return rank, scaling


def with_sizes(config: Mapping[str, Any], sizes: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """The configuration of a plain LoRA that has the given rank and scaling in each target.

    If all scalings are equal, the alphas are proportional to the ranks. Then a runtime that reads tensors of any rank
    but does not know patterns scales them correctly.
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


# -- the tensors


def _factors(config: dict[str, Any], config_path: Path, weights: TensorFile) -> dict[str, LoraFactors]:
    factors: dict[str, LoraFactors] = {}
    for place, keys in _places(weights, config["use_dora"]).items():
        path, parameter = _module_and_parameter(place.removeprefix(PREFIX), config, weights)
        target = f"{path}.{parameter}" if parameter else path
        with file_errors(config_path, PLAIN_LORA):
            rank, scaling = size_of(config, target)
        a, b = (weights.entries[key].shape for key in keys)
        is_fused = parameter in EXPERT_WEIGHTS
        experts = max(1, a[0] // rank) if is_fused and a and all(a) else 1
        layers = tuple(f"{path}.{index}.{parameter}" for index in range(experts)) if is_fused else (path,)
        # A factor has a row and a column; a convolution's has more dimensions, the kernel.
        row = tuple(max(1, size) for size in a[1 : 2 if is_fused else None]) or (1,)
        factors[target] = LoraFactors(keys, layers, row, max((1, *b[:1])), target, rank, scaling)
        for key, shape in factors[target].shapes(rank).items():
            weights.expect(key, shape, SAVED_FLOATS, f"{target}, whose rank is {rank} in {config_path.name}")
    if not factors:
        raise ValueError(f"{weights.path} holds no factors: no tensor is called lora_A or lora_embedding_A [P071]")
    return factors


def _places(weights: TensorFile, dora: bool) -> dict[str, tuple[str, str]]:
    """The keys of the two factors of each module, by its name in PEFT's file."""
    tensors: dict[str, set[str]] = {}
    for name in weights.entries:
        place, separator, leaf = name.rpartition(".lora_")
        if separator:
            tensors.setdefault(place, set()).add(f"lora_{leaf}")
    places: dict[str, tuple[str, str]] = {}
    for place, leaves in tensors.items():
        pair = next((pair for pair in FACTOR_KEYS if leaves.issuperset(pair)), ())
        if not pair or not place.startswith(PREFIX) or not leaves.issubset((*pair, *_BESIDE)):
            raise ValueError(
                f"{weights.path}: module {quote(place)} has the tensors {quote(sorted(leaves))}; needed: "
                f"{' and '.join(FACTOR_KEYS[0])}, or {' and '.join(FACTOR_KEYS[1])}, and perhaps {', '.join(_BESIDE)}, "
                f"of a module whose name begins with {PREFIX}"
            )
        if dora and not leaves & set(_MAGNITUDES):
            raise ValueError(
                f"{weights.path}: tensor {quote(f'{place}.{MAGNITUDE}')} is missing, of DoRA (PEFT leaves magnitudes "
                "out when it subtracts the initial adapter: convert the adapter that was trained)"
            )
        places[place] = (f"{place}.{pair[0]}", f"{place}.{pair[1]}")
    return places


def _module_and_parameter(place: str, config: dict[str, Any], weights: TensorFile) -> tuple[str, str]:
    """The module whose factors are at a place, and its parameter if `target_parameters` names it: "weight", or a weight
    of fused experts. "" means none."""
    path, leaves = place.split(".base_layer")[0], set()
    for name in map(str, config["target_parameters"] or ()):
        leaf = name.rpartition(".")[2]
        if f".{path}.{leaf}".endswith(f".{name}"):
            leaves.add(leaf)
    if path == place and (not leaves or leaves == {"weight"}):
        return path, "".join(leaves)
    if weight := weight_at(place, leaves):
        return weight
    raise ValueError(
        f"{weights.path}: the tensors of {quote(PREFIX + place)} are those of a parameter, but target_parameters names "
        f"{sorted(leaves)} of that module; known are {', '.join(EXPERT_WEIGHTS)} of fused experts"
    )
