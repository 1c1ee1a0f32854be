"""A layer of a checkpoint on disk: the tensors that its matrix consists of, and the form in which it is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pissa.base.bitsandbytes_state import entry_layout
from pissa.base.kinds import base_of
from pissa.config import Form
from pissa.files.messages import shown
from pissa.files.model_folder import Part
from pissa.files.source import Source
from pissa.files.tensor_file import Layout
from pissa.ops.checks import FLOATS
from pissa.ops.formats import FORMATS

_Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtypes and shapes, by name."""


@dataclass(frozen=True)
class CheckpointLayer:
    """A layer of a checkpoint that is written anew."""

    name: str
    """In the model. Each matrix of fused experts is a layer."""
    parts: tuple[Part, ...]
    """What its matrix [out, in] consists of, one below the other."""
    shape: tuple[int, int]
    dtype: torch.dtype
    """Of the dense weight."""
    form: Form
    """How it is written: in codes, if the form is a format."""

    @property
    def tensors(self) -> list[str]:
        """The tensors of the checkpoint that it is read from."""
        return [part.tensor for part in self.parts]

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
        return self.name if len(self.parts) > 1 or part.member is not None or own == part.tensor else own

    @property
    def written(self) -> _Tensors:
        """The tensors that it is written in, if it changes its form."""
        if not self.is_packed:
            return {self.parts[0].tensor: (self.dtype, self.shape)}
        entries = entry_layout(self.form, self.shape, self.dtype)
        return {f"{self.target}.{name}": kind for name, kind in entries.items()}


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
                f"{list(entry.shape)}; "
                f"needed: float32, bfloat16 or float16, one for a layer, and {dimensions} dimensions for a matrix"
            )
        out, inner = (shape[1], shape[0]) if part.transposed else (shape[0], math.prod(shape[1:]))
        rows += out
        columns.add(inner)
    if len(columns) > 1:
        raise ValueError(f"layer {name} is made of tensors with {sorted(columns)} columns; needed: one number")
    return (rows, columns.pop()), entries[0].dtype


def new_shards(source: Source, changed: Iterable[CheckpointLayer]) -> dict[str, Layout]:
    """The safetensors files of the new checkpoint, by name: every tensor in the place that it has in the old one.

    Args:
        changed: the layers that change their form; their new tensors lie where the first old one did.
    """
    files: dict[str, _Tensors] = {path.name: {} for path in source.paths}
    new: dict[str, _Tensors] = {}
    for layer in changed:
        new.setdefault(layer.tensors[0], {}).update(layer.written)
        for tensor in layer.tensors[1:]:
            new.setdefault(tensor, {})
    for name in source.names:
        entry = source.entry(name)
        files[source.path_of(name).name] |= new.get(name, {name: (entry.dtype, entry.shape)})
    return {name: Layout(tensors, {"format": "pt"}) for name, tensors in files.items()}


def linear_layers(model: nn.Module) -> list[str]:
    """The names of the linear layers of a model, of which config.json lists those that stay dense beside codes."""
    return [name for name, module in model.named_modules() if base_of(module).kind in (nn.Linear, Conv1D)]
