"""A plain LoRA in a folder, as PEFT writes it, read without a model: its tensors, and the rank and scaling of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pissa.files.expert_layout import weight_at
from pissa.files.json_file import reading
from pissa.files.lora_config import PLAIN_LORA, read_lora_config, size_of
from pissa.files.messages import shown
from pissa.files.peft_layout import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    FACTOR_KEYS,
    MAGNITUDE,
    PREFIX,
    FactorTensors,
    Matrices,
)
from pissa.files.tensor_file import SAVED_FLOATS, TensorFile
from pissa.layers.experts import WEIGHTS as EXPERT_WEIGHTS
from pissa.ops.checks import check_scaling

# PEFT has written magnitudes under both names.
_MAGNITUDES = (MAGNITUDE, f"{MAGNITUDE}.weight")
# What else PEFT trains in a layer; it stays as it is.
_BESIDE = ("lora_B.bias", *_MAGNITUDES)


@dataclass(frozen=True)
class LoraFactors(FactorTensors):
    """The factors of one target, a layer or one weight of all experts of a module, with their rank and scaling."""

    target: str
    """The name that PEFT compares with `rank_pattern`: the layer's in the model, or that of the experts' parameter."""
    rank: int
    scaling: float

    @property
    def is_fused(self) -> bool:
        """Whether they are those of a weight of fused experts."""
        path, _, leaf = self.target.rpartition(".")
        return self.layers[0] == f"{path}.0.{leaf}"

    @property
    def is_embedding(self) -> bool:
        """Whether they are an embedding's, whose weight [in, out] is a matrix transposed."""
        return self.keys[0].endswith(FACTOR_KEYS[1][0])


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
        config = read_lora_config(config_path)
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
        return list(factors.unpack(a, b).values())


def _factors(config: dict[str, Any], config_path: Path, weights: TensorFile) -> dict[str, LoraFactors]:
    found: dict[str, LoraFactors] = {}
    for place, keys in _places(weights, config["use_dora"]).items():
        path, parameter = _module_and_parameter(place.removeprefix(PREFIX), config, weights)
        target = f"{path}.{parameter}" if parameter else path
        with reading(config_path, PLAIN_LORA):
            rank, scaling = size_of(config, target)
            check_scaling(scaling)
        a, b = (weights.shape(key) for key in keys)
        is_fused = parameter in EXPERT_WEIGHTS
        experts = a[0] // rank if is_fused and a else 1
        if not _fit(a, b, experts * rank, is_fused):
            raise ValueError(
                f"{weights.path}: tensors {shown(keys[0])} {list(a)} and {shown(keys[1])} {list(b)} are no factors of "
                f"rank {rank}{' for each expert' if is_fused else ''}, which {config_path.name} gives them; that many "
                "rows and columns are needed"
            )
        for key, shape in zip(keys, (a, b), strict=True):
            weights.expect(key, shape, SAVED_FLOATS, f"the adapter of {target}")
        layers = tuple(f"{path}.{index}.{parameter}" for index in range(experts)) if is_fused else (path,)
        found[target] = LoraFactors(keys, layers, a[1:], b[0], target, rank, scaling)
    if not found:
        raise ValueError(f"{weights.path} holds no factors: no tensor is called lora_A or lora_embedding_A")
    return found


def _fit(a: Sequence[int], b: Sequence[int], rank: int, is_fused: bool) -> bool:
    """Whether the shapes are those of factors a [rank, in] and b [out, rank], or of a convolution's, a [rank, in,
    *kernel] and b [out, rank, 1, ...]."""
    if len(a) != len(b) or len(a) < 2 or (is_fused and len(a) > 2) or 0 in (*a, *b) or set(b[2:]) - {1}:
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
        pair = next((pair for pair in FACTOR_KEYS if suffix in pair), None)
        if not place.startswith(PREFIX) or (pair is None and suffix not in _BESIDE):
            raise ValueError(
                f"{weights.path}: tensor {shown(name)} is no part of a LoRA that is known here; those are called "
                f"{PREFIX}<layer>.<{', '.join([*FACTOR_KEYS[0], *FACTOR_KEYS[1], *_BESIDE])}>"
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
                f"{weights.path}: tensor {shown(f'{place}.{MAGNITUDE}')} is missing, of DoRA (PEFT leaves magnitudes "
                "out when it subtracts the initial adapter: convert the adapter that was trained)"
            )
    return places


def _module_and_parameter(place: str, config: dict[str, Any], weights: TensorFile) -> tuple[str, str]:
    """The module whose factors are at a place, and its parameter if that is named in `target_parameters`: "weight", or
    a weight of fused experts. "" stands for none."""
    path = place.split(".base_layer")[0]
    leaves = {name.rpartition(".")[2] for name in config["target_parameters"] or () if _is_parameter_of(path, name)}
    if path == place and (not leaves or leaves == {"weight"}):
        return path, "".join(leaves)
    if found := weight_at(place, leaves):
        return found
    raise ValueError(
        f"{weights.path}: the tensors of {shown(PREFIX + place)} are those of a parameter, but of target_parameters "
        f"{sorted(leaves)} belong to that module; known are {', '.join(EXPERT_WEIGHTS)} of fused experts"
    )


def _is_parameter_of(path: str, name: str) -> bool:
    parameter = f"{path}.{name.rpartition('.')[2]}"
    return parameter == name or parameter.endswith(f".{name}")
