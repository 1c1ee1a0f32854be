"""Dense weights that stay on the disk until a stored base replaces them, so that the dense model is never in memory."""

from __future__ import annotations

import warnings
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from pissa.base.weights import leave_on_disk
from pissa.checkpoints.rewrite import matrix_shape
from pissa.config import IMPLICIT, PissaConfig
from pissa.containers.checkpoint import EXPERT, Checkpoint
from pissa.containers.model_folder import Part
from pissa.layers.layer import pissa_layers
from pissa.layers.modules import PissaLinear
from pissa.model.inject import own_config
from pissa.model.pissa_model import model_class

Parameters = Mapping[str, Mapping[str, tuple[Part, ...]]]
"""Parameters of a model, each with the parts of its layers, by their names with experts one by one."""

_PAGES = 1 << 28
"""Bytes of weights whose pages stay in memory when the next one is read. A group that is decomposed together has fewer,
or is a single weight."""


def to_replace(checkpoint: Checkpoint, config: PissaConfig) -> dict[str, dict[str, tuple[Part, ...]]]:
    """The dense parameters that need not be in memory, because a residual will replace all of their layers. Left out
    are those that transformers makes in a way that is not known here, or would refuse."""
    if config.form == IMPLICIT:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is said when the model itself is adapted
        config = own_config(config)
        model = model_class(config)(checkpoint.meta_model(), config, "default").base_model.model
    uses = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))
    adapted = pissa_layers(model).items()
    shapes = {
        name: layer.base.parameter.shape
        for name, layer in adapted
        if isinstance(layer, PissaLinear) and uses[id(layer.base.parameter)] == 1
    }
    found: dict[str, dict[str, tuple[Part, ...]]] = {}
    for layer in shapes:
        match = EXPERT.fullmatch(layer)
        fused = f"{match[1]}.{match[2]}" if match else ""
        name = fused if fused in checkpoint.tensors else f"{layer}.weight"
        if name not in found:
            with suppress(ValueError):
                found[name] = checkpoint.layers_of(name)
    return {name: layers for name, layers in found.items() if _are_dense(layers, shapes, checkpoint)}


def _are_dense(layers: Mapping[str, Sequence[Part]], shapes: Mapping[str, torch.Size], checkpoint: Checkpoint) -> bool:
    """Whether all of these layers are dense in the checkpoint, and have these shapes."""
    if any(part.tensor in checkpoint.coded for parts in layers.values() for part in parts):
        return False
    try:
        return all(matrix_shape(layer, parts, checkpoint)[0] == shapes.get(layer) for layer, parts in layers.items())
    except ValueError:
        return False


def leave_parameters(model: nn.Module, reader: Reader, unread: Parameters, device: torch.device) -> None:
    """Lets the layers of these parameters of an adapted, unwrapped model read their weights when they are needed."""
    adapted = pissa_layers(model)
    for name, parts in (item for layers in unread.values() for item in layers.items()):
        leave_on_disk(adapted[name].base.module, partial(reader.read, parts), device)


class Reader:
    """Reads dense weights, and releases the pages of those that were read long ago. (Who still uses one reads them
    again.)"""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint: Checkpoint | None = checkpoint
        self._in_memory: deque[tuple[list[str], int]] = deque()

    def read(self, parts: Sequence[Part]) -> Tensor:
        """The matrix of these parts, as it is in the checkpoint."""
        assert self._checkpoint is not None
        self._release(_PAGES)
        matrix = self._checkpoint.matrix(parts)
        self._in_memory.append((list(dict.fromkeys(part.tensor for part in parts)), matrix.nbytes))
        return matrix

    def close(self) -> None:
        """Releases all pages, and lets go of the files, which replaced modules would keep mapped: accelerate's hooks
        are in cycles of references, which live until Python collects them."""
        self._release(0)
        self._checkpoint = None

    def _release(self, most: int) -> None:
        """Releases the pages that were read first, until at most so many bytes are left."""
        while self._in_memory and sum(size for _, size in self._in_memory) > most:
            assert self._checkpoint is not None
            self._checkpoint.release(self._in_memory.popleft()[0])


def tensors_of(parameters: Parameters) -> list[str]:
    """The tensors of the checkpoint that make these parameters."""
    parts = (part for layers in parameters.values() for parts in layers.values() for part in parts)
    return list(dict.fromkeys(part.tensor for part in parts))
