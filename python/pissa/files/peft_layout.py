"""PEFT's layout of a LoRA on disk: its two files, and the names and shapes of the tensors in one of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from pissa.files.expert_layout import stack, unstack
from pissa.layers.kinds import PissaEmbedding
from pissa.layers.layer import PissaLayer

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

PREFIX = "base_model.model."
"""What PEFT puts before the names of the (unwrapped) model's modules."""

FACTOR_KEYS = (PissaLayer.factor_keys, PissaEmbedding.factor_keys)
"""The names of the two factors, behind the layer's: of a layer with a weight matrix or a kernel, of an embedding."""
MAGNITUDE = "lora_magnitude_vector"
"""The name of DoRA's magnitudes [out], behind the layer's."""

Matrices = tuple[Tensor, Tensor]
"""A factor a [rank, in] and a factor b [out, rank]."""


@dataclass(frozen=True)
class FactorTensors:
    """Two tensors: the factors of one layer, or, stacked, those of one weight of all experts of a module."""

    keys: tuple[str, str]
    layers: tuple[str, ...]
    """Names in the model; more than one are the experts, in order."""
    row: tuple[int, ...]
    """The shape of a row of factor a: [in], or, of a convolution, [in, *kernel]."""
    out: int

    def pack(self, matrices: Sequence[Matrices]) -> dict[str, Tensor]:
        """The tensors under their names, float32, from the matrices of each layer, which may have any one rank."""
        a, b = stack(matrices) if len(self.layers) > 1 else matrices[0]
        pair = a.reshape(-1, *self.row), b.reshape(self.out, -1, *self._point)
        return {key: tensor.float().contiguous() for key, tensor in zip(self.keys, pair, strict=True)}

    def unpack(self, a: Tensor, b: Tensor) -> dict[str, Matrices]:
        """The matrices of each layer, from the tensors."""
        matrices = a.flatten(1), b.flatten(1)
        experts = unstack(*matrices, len(self.layers)) if len(self.layers) > 1 else [matrices]
        return dict(zip(self.layers, experts, strict=True))

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The tensors' shapes for factors of that rank."""
        rows = rank * len(self.layers)
        return dict(zip(self.keys, ((rows, *self.row), (self.out, rows, *self._point)), strict=True))

    @property
    def _point(self) -> tuple[int, ...]:
        """The kernel of factor b: a convolution's is one point."""
        return (1,) * (len(self.row) - 1)


@dataclass(frozen=True)
class MirroredTensors(FactorTensors):
    """The same of weights that PEFT takes for the other way round: their factors are bᵀ and aᵀ. `row` is [out], and
    `out` is in."""

    def pack(self, matrices: Sequence[Matrices]) -> dict[str, Tensor]:
        return super().pack([(b.mT, a.mT) for a, b in matrices])

    def unpack(self, a: Tensor, b: Tensor) -> dict[str, Matrices]:
        return {layer: (b.mT, a.mT) for layer, (a, b) in super().unpack(a, b).items()}


def magnitude_key(layer: str) -> str:
    """The name of the magnitudes [out] of a layer with DoRA, given by its name in the (unwrapped) model."""
    return f"{PREFIX}{layer}.{MAGNITUDE}"


def base_weight_key(layer: str) -> str:
    """The name of an adapted layer's own weight, which PEFT saves of embeddings and output layers."""
    return f"{PREFIX}{layer}.base_layer.weight"


def is_of_a_layer(key: str, layers: Iterable[str]) -> bool:
    """Whether a tensor is a factor, or a base weight, of one of the layers, given by name.

    A bias is not, since it may be trained beside the adapter. (A merged layer has its bias twice; the one below
    `lora_unmerged` is the layer's.) Nor are the tensors of `modules_to_save`.
    """
    kept = key.endswith(".bias") and ".lora_unmerged." not in key
    return not kept and key.startswith(tuple(f"{PREFIX}{name}." for name in layers))
