"""A model in a folder, of which one matrix at a time is read: it is built without values, and its files are mapped."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from pissa.files.composition import Composition, Part
from pissa.files.messages import read_object, reading, shown
from pissa.files.source import Source

CONFIG = "config.json"


def class_of(config: Any) -> Any:
    """transformers' class that a config.json names.

    Raises:
        ValueError: it names none.
    """
    names = config.architectures if isinstance(config.architectures, list) else ()
    for name in names:
        kind = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
            return kind
    raise ValueError(
        f"architectures is {shown(config.architectures)}; needed: a class of transformers {transformers.__version__}, "
        "such as LlamaForCausalLM"
    )


def model_config(folder: str | os.PathLike[str]) -> Any:
    """What a model's config.json says, as transformers takes it. Code that comes with a model is not run.

    Args:
        folder: of the model, or its name on the Hub.

    Raises:
        ValueError: naming the file: transformers cannot read it.
    """
    with _config_of(folder):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def meta_model(folder: Path) -> PreTrainedModel:
    """The model that the folder's config.json describes, without values.

    Raises:
        ValueError: it cannot be built.
    """
    config = model_config(folder)
    with _config_of(folder), torch.device("meta"):
        model: PreTrainedModel = class_of(config)(config)
    return model


def _config_of(folder: str | os.PathLike[str]) -> AbstractContextManager[None]:
    """For errors of transformers, of huggingface_hub, and Python's, of values that these have not checked."""
    return reading(
        Path(folder) / CONFIG, f"It describes no model that transformers {transformers.__version__} can build"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The object in the config.json of a model's folder, as it is.

    Raises:
        ValueError: naming the file: there is none, or another thing in it.
    """
    with reading(folder / CONFIG, "It is damaged or no model's: take it from the model again"):
        return read_object(folder / CONFIG)


def quantised_kind(folder: Path) -> str | None:
    """How the weights in a model's folder are quantised, by its config.json; None if they are dense."""
    config = getattr(model_config(folder), "quantization_config", None)
    if config is None:
        return None
    return str(config.get("quant_method", "by an unknown method")) if isinstance(config, dict) else shown(config)


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
