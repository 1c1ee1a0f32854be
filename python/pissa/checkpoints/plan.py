"""What becomes of each tensor of a checkpoint, by names and shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pissa.base.bitsandbytes_state import entry_layout
from pissa.base.kinds import base_of
from pissa.config import IMPLICIT, Form
from pissa.files.messages import shown
from pissa.files.model_folder import Part, matrix_of
from pissa.files.peft_layout import FactorTensors
from pissa.files.tensor_file import Layout, Source
from pissa.ops.checks import FLOATS
from pissa.ops.formats import FORMATS

_Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtypes and shapes, by name."""


@dataclass(frozen=True)
class Layer:
    """A layer of a checkpoint that is written anew."""

    name: str
    """In the model. Each matrix of fused experts is a layer."""
    parts: tuple[Part, ...]
    """What its matrix [out, in] consists of, one below the other."""
    shape: tuple[int, int]
    dtype: torch.dtype
    """Of the dense weight."""
    form: Form = IMPLICIT
    """How it is written: in codes, if the form is a format; else dense."""
    is_expert: bool = False
    """Of a fused weight."""
    entries: Mapping[str, str] = field(default_factory=dict)
    """If the checkpoint has its weight in codes: the tensors of bitsandbytes' entries, by the entries' names."""
    transposed: bool = False
    """Whether the module's own weight is [in, out]."""
    own_key: str | None = None
    """The adapter's tensor that the adapter was trained on in the place of the checkpoint's weight."""
    mirrored: bool = False
    """Whether the factors in the adapter's file are those of the transposed matrix."""

    @property
    def tensors(self) -> list[str]:
        """The tensors of the checkpoint that it is read from."""
        return list(self.entries.values()) or [part.tensor for part in self.parts]

    @property
    def is_packed(self) -> bool:
        """Whether it is written in codes."""
        return self.form.kind in FORMATS

    @property
    def target(self) -> str:
        """What its module is called in the new checkpoint, if it is written in codes: transformers finds them by the
        checkpoint's own names, unless they are of something that it has put together."""
        part = self.parts[0]
        own = part.tensor.removesuffix(".weight")
        is_own = len(self.parts) == 1 and part.member is None and own != part.tensor and not self.is_expert
        return own if is_own else self.name

    @property
    def written(self) -> _Tensors:
        """The tensors that it is written in, if it changes its form."""
        if not self.is_packed:
            return {self.parts[0].tensor: (self.dtype, self.shape)}
        entries = entry_layout(self.form, self.shape, self.dtype)
        return {f"{self.target}.{name}": kind for name, kind in entries.items()}

    def matrix(self, source: Source) -> Tensor:
        """The dense weight: a view of the mapped file, if it has one part."""
        return matrix_of(self.parts, source)


class Unit(NamedTuple):
    """What is done, and noted, at once: all layers of a pair of factors, a layer without any, or one other tensor."""

    name: str
    layers: tuple[Layer, ...] = ()
    factors: FactorTensors | None = None
    tensor: str | None = None
    """The other tensor; it is copied, unless there is a key."""
    key: str | None = None
    """The adapter's tensor that takes its place."""
    rows: tuple[int, ...] | None = None
    """The rows whose place the adapter's tensor takes, if not all."""
    scaling: float | None = None
    """With it, the adapter's tensor is added."""

    @property
    def tensors(self) -> list[str]:
        """The tensors of the checkpoint that it is made of."""
        found = [tensor for layer in self.layers for tensor in layer.tensors]
        return list(dict.fromkeys([*found, *([self.tensor] if self.tensor else [])]))


@dataclass(frozen=True)
class Plan:
    """What a run makes of a checkpoint."""

    source: Source
    units: list[Unit]
    """In the order of the files."""
    files: dict[str, Layout]
    """The safetensors files that it writes, by their names in the folder; the checkpoint's keep theirs."""
    dense_linears: list[str]
    """The linear layers of the model that are dense in the new checkpoint, of which config.json has a list if others
    are packed."""

    @property
    def layers(self) -> dict[str, Layer]:
        """All layers, by name."""
        return {layer.name: layer for unit in self.units for layer in unit.layers}

    @property
    def copied(self) -> list[str]:
        """The tensors that are copied."""
        return [unit.tensor for unit in self.units if unit.tensor is not None and unit.key is None]

    @property
    def packed(self) -> list[Layer]:
        """The layers that are written in codes."""
        return [layer for layer in self.layers.values() if layer.is_packed]

    @property
    def has_packed_experts(self) -> bool:
        """Whether some of these are of fused experts, which only we read."""
        return any(layer.is_expert for layer in self.packed)


def in_order(source: Source, units: Iterable[Unit]) -> list[Unit]:
    """The units and one for each tensor that is copied, in the order of the files."""
    units = list(units)
    changed = {tensor for unit in units for tensor in unit.tensors}
    units += [Unit(f"copy {name}", tensor=name) for name in source.names if name not in changed]
    places = {name: number for number, name in enumerate(source.names)}
    return sorted(units, key=lambda unit: min(places[tensor] for tensor in unit.tensors))


def new_shards(source: Source, units: Iterable[Unit]) -> dict[str, Layout]:
    """The safetensors files of the new checkpoint, by name: every tensor in the place that it has in the old one. The
    new tensors of a layer that changes its form lie where the first old one did."""
    files: dict[str, _Tensors] = {path.name: {} for path in source.paths}
    new: dict[str, _Tensors] = {}
    for layer in (layer for unit in units for layer in unit.layers if layer.entries or layer.is_packed):
        new.setdefault(layer.tensors[0], {}).update(layer.written)
        for tensor in layer.tensors[1:]:
            new.setdefault(tensor, {})
    for name in source.names:
        entry = source.entry(name)
        files[source.path_of(name).name] |= new.get(name, {name: (entry.dtype, entry.shape)})
    return {name: Layout(tensors) for name, tensors in files.items()}


def matrix_shape(
    name: str, parts: Sequence[Part], source: Source, dimensions: int = 2
) -> tuple[tuple[int, int], torch.dtype]:
    """The shape of the matrix [out, in] that a layer's parts make, and their dtype.

    Args:
        dimensions: of each part: more than 2 of a convolution.

    Raises:
        ValueError: parts that make no matrix, naming the file, the tensor and the layer.
    """
    entries = [source.entry(part.tensor) for part in parts]
    rows, columns = 0, set()
    for part, entry in zip(parts, entries, strict=True):
        shape = entry.shape if part.member is None else entry.shape[1:]
        is_member = part.member is None or part.member < entry.shape[0]
        if entry.dtype not in FLOATS or entry.dtype != entries[0].dtype or len(shape) != dimensions or not is_member:
            raise ValueError(
                f"{source.path_of(part.tensor)}: tensor {shown(part.tensor)} of layer {name} is {entry.dtype} "
                f"{list(entry.shape)}; needed: float32, bfloat16 or float16, one for a layer, and {dimensions} "
                "dimensions for a matrix"
            )
        out, inner = (shape[1], shape[0]) if part.transposed else (shape[0], math.prod(shape[1:]))
        rows += out
        columns.add(inner)
    if len(columns) > 1:
        raise ValueError(f"layer {name} is made of tensors with {sorted(columns)} columns; needed: one number")
    return (rows, columns.pop()), entries[0].dtype


def linear_layers(model: nn.Module) -> list[str]:
    """The names of the linear layers of a model."""
    return [name for name, module in model.named_modules() if base_of(module).kind in (nn.Linear, Conv1D)]
