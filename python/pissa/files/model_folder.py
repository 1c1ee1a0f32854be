"""A model in a folder, of which one matrix at a time is read: it is built without values, and its files are mapped."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from pissa.files.composition import Composition, Part
from pissa.files.messages import first_line, shown
from pissa.files.source import Source


def class_of(config: Any) -> Any:
    """transformers' class that a config.json names.

    Raises:
        ValueError: it names none.
    """
    for name in config.architectures or ():
        if isinstance(kind := getattr(transformers, name, None), type) and issubclass(kind, PreTrainedModel):
            return kind
    raise ValueError(
        f"architectures is {shown(config.architectures)}; needed: a class of transformers {transformers.__version__}, "
        "such as LlamaForCausalLM"
    )


def meta_model(folder: Path) -> PreTrainedModel:
    """The model that the folder's config.json describes, without values.

    Raises:
        ValueError: it cannot be built.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model: PreTrainedModel = class_of(config)(config)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{folder / 'config.json'} describes no model that transformers {transformers.__version__} can build: "
            f"{first_line(error)}"
        ) from error
    return model


def quantised_kind(folder: Path) -> str | None:
    """How the weights in a model's folder are quantised, by its config.json; None if they are dense."""
    config = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None)
    return None if config is None else str(config.get("quant_method", "by an unknown method"))


def matrix_of(parts: Sequence[Part], source: Source) -> Tensor:
    """The matrix that these parts are, one below the other: a view of the mapped file, if it is one part."""
    views = []
    for part in parts:
        tensor = source.read(part.tensor)
        matrix = tensor if part.member is None else tensor[part.member]
        views.append(matrix.mT if part.transposed else matrix)
    return views[0] if len(views) == 1 else torch.cat(views)


def parts_of(matrix: Tensor, parts: Sequence[Part], source: Source) -> Iterator[tuple[str, Tensor, int | None]]:
    """The way back from `matrix_of`: what a new matrix puts into the tensors of the parts, each with its number in
    it if that is a stack."""
    row = 0
    for part in parts:
        shape = source.entry(part.tensor).shape[0 if part.member is None else 1 :]
        rows = matrix[row : row + shape[1 if part.transposed else 0]]
        row += len(rows)
        values = (rows.mT if part.transposed else rows).reshape(shape)
        yield part.tensor, values if part.member is None else values[None], part.member


class ModelFolder:
    """The dense model in a folder, and its layers' weights.

    Raises:
        ValueError: the folder holds no safetensors, or they are damaged; its config.json describes no model that can be
            built, or a quantised one, or one of a dtype that loses digits of the files.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._source = Source.open(folder)
        self.model = meta_model(self._source.folder)
        """On the meta device."""
        if getattr(self.model.config, "quantization_config", None):
            raise ValueError(f"{folder} is quantised")
        for dtype in {self._source.entry(name).dtype for name in self._source.names}:
            if self.model.config.dtype not in (None, torch.promote_types(dtype, self.model.config.dtype)):
                raise ValueError(
                    f"{folder} holds {dtype}, which transformers rounds to {self.model.config.dtype}, of config.json"
                )
        self._composition = Composition(self.model, self._source.names)

    def check(self, layer: str) -> None:
        """Raises ValueError if the files lack the layer's weight, or hold it in a way that is not known here."""
        self._composition.matrix(f"{layer}.weight", transposed=False)

    def weight(self, layer: str) -> Tensor:
        """The layer's weight, of two dimensions; as `matrix_of`."""
        return matrix_of(self._composition.matrix(f"{layer}.weight", transposed=False), self._source)

    def release(self, layer: str) -> None:
        """Gives back the memory of the mapped file that the layer's weight takes."""
        self._source.release([part.tensor for part in self._composition.matrix(f"{layer}.weight", transposed=False)])
