"""A model on disk: what its folder contains, and its weights by the names that dense ones have, whatever stores them.
No other code asks what a model's folder is."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from pissa import ops
from pissa.base.released_layouts import join_rows
from pissa.containers.coded_weights import coded_weights, scales_of_inputs
from pissa.containers.gguf_config import config_of
from pissa.containers.gguf_file import model_file, open_gguf
from pissa.containers.gguf_model import GgufSource
from pissa.containers.gguf_tokenizer import tokenizer_of
from pissa.containers.hub import Name, find_file, model_files, weight_files
from pissa.containers.messages import file_errors, quote
from pissa.containers.model_folder import (
    NO_MODEL,
    Composition,
    Part,
    check_no_code,
    class_of,
    load_tokenizer,
    model_config,
    read_config,
)
from pissa.containers.recognise import CONFIG, has_model
from pissa.containers.tensor_file import Entry, Source
from pissa.layers.experts import WEIGHTS, is_transposed

PISSA_RECORD = "pissa.json"
"""The record of `pissa init` in the folder of a residual, and of an adapter in its own."""

INITIAL_FOLDER = "pissa_init"
"""The folder in that of a residual that contains the adapter before training, where the paper's authors store it."""

_INITIAL_CONFIG = f"{INITIAL_FOLDER}/adapter_config.json"

RESIDUAL_KEY = "pissa_residual"
"""The field of a residual's config.json that says so. transformers keeps fields that it does not know."""

RELEASED_METHODS = ("fp8", "mxfp4", "compressed-tensors", "modelopt")
"""The `quant_method` of released models that are read."""


class Contents(Enum):
    """What the folder of a model contains."""

    DENSE = "weights in 16 or 32 bits"
    RELEASED = "codes in which the model was released"
    BITSANDBYTES = "codes of bitsandbytes"
    RESIDUAL = "a residual of pissa"
    PEFT_RESIDUAL = f"a residual, whose initial adapter is in {INITIAL_FOLDER}"
    GGUF = "the weights of a GGUF file"
    OTHER = "codes that are not read"


READ = tuple(contents for contents in Contents if contents is not Contents.OTHER)
"""What can be read matrix by matrix."""

AS_STORED = (Contents.RELEASED, Contents.GGUF)
"""What pissa.load leaves as it is, and transformers would expand."""

_INSTEAD = {
    Contents.DENSE: "give the checkpoint in codes",
    Contents.RELEASED: "pissa.load reads it as it is",
    Contents.BITSANDBYTES: "pissa.load reads it as it is",
    Contents.RESIDUAL: "its adapter may have what it lacks: pissa.load puts both together; or give the model that "
    "was split",
    Contents.PEFT_RESIDUAL: "it lacks that adapter: train that one, with peft.PeftModel.from_pretrained(model, "
    f"FOLDER, subfolder={INITIAL_FOLDER!r}, is_trainable=True), or give the model that was split",
    Contents.GGUF: "pissa.load reads it as it is",
    Contents.OTHER: f"read are bitsandbytes, {', '.join(RELEASED_METHODS)}",
}


Opened = TypeVar("Opened", bound="ModelFolder")


class ModelFolder:
    """A model's folder or GGUF file, and what it contains, without its weights."""

    def __init__(self, folder: Path, name: str | None = None, described: Path | None = None) -> None:
        file = model_file(folder)
        if file is None and described is not None:
            raise ValueError(f"{folder} is no GGUF file and describes itself: leave config_from out")
        self.files = [] if file is None else open_gguf(file)
        """The files of a model in GGUF, the first of which has its metadata."""
        self.folder = self.files[0].path if self.files else folder
        """The folder, or the GGUF file."""
        self.described = described or self.folder
        """The folder with config.json and the tokenizer, or the GGUF file whose metadata say the same."""
        self.name = name or os.path.abspath(self.folder)
        """Its name on the Hub, or the absolute path of its folder or file."""
        self._by_metadata = bool(self.files) and described is None
        self.config = {} if self._by_metadata else read_config(self.described)
        """The content of config.json."""
        if self.files:
            self.config = config_of(self.files, self.config)
        entry = (not self.files and self.config.get("quantization_config")) or {}
        self.quantization: dict[str, Any] = entry if isinstance(entry, dict) else {"quant_method": entry}
        """The `quantization_config` of config.json, empty if there is none."""
        self.quant_method: str | None = self.quantization.get("quant_method")
        self.contents = self._contents()

    files_of = staticmethod(model_files)
    """Downloads the files that are read, and returns their folder."""

    @classmethod
    def open(cls: type[Opened], name: Name, revision: str | None = None, *, config_from: Name | None = None) -> Opened:
        """Opens the model in a folder or a GGUF file, or the one of that name on the Hub, whose files are downloaded
        first. `config_from` is a model whose config.json and tokenizer are taken for that in a GGUF file.

        Raises:
            ValueError: there is none, or a file cannot be read. The message names it.
        """
        folder = cls.files_of(name, revision)
        described = None if config_from is None else model_files(config_from)
        return cls(folder, None if folder == Path(name) else str(name), described)

    def built_config(self) -> Any:
        """The content of config.json, as transformers takes it.

        Raises:
            ValueError: transformers has no such model, or only the code that comes with it builds it.
        """
        self.check_no_code()
        if not self.files:
            return model_config(self.folder)
        with file_errors(self._description, NO_MODEL):
            return AutoConfig.for_model(**self.config)

    def meta_model(self) -> PreTrainedModel:
        """A new model as config.json describes it, without values."""
        config = self.built_config()
        with file_errors(self._description, NO_MODEL), torch.device("meta"):
            model: PreTrainedModel = class_of(config)(config)
        return model

    def check_no_code(self) -> None:
        """Raises ValueError if only the code that comes with the model builds it."""
        check_no_code(self.described, self.config)

    @property
    def _description(self) -> Path:
        """The file that describes the model, for errors."""
        return self.described if self._by_metadata else self.described / CONFIG

    def tokenizer(self, adapter: Name | None = None, **options: Any) -> Any:
        """The tokenizer: that of an adapter on the model, a folder or a name on the Hub, if it has one of its own, and
        otherwise the model's. The options are those of transformers, without effect on a GGUF file's own. Code that
        comes with it is only run with trust_remote_code=True.

        Raises:
            ValueError, OSError, KeyError, TypeError: there is none that transformers can build.
        """
        if adapter is not None and get_tokenizer_config(adapter):
            return load_tokenizer(adapter, **options)
        if self._by_metadata:
            return tokenizer_of(self.files[0])
        return load_tokenizer(self.described, **options)

    @contextmanager
    def small_files(self) -> Iterator[Path]:
        """A folder with all files but the weights, for the block."""
        if not self._by_metadata:
            yield self.described
            return
        with TemporaryDirectory() as folder:
            self.tokenizer().save_pretrained(folder)
            yield Path(folder)

    def require(self, *allowed: Contents) -> None:
        """Raises ValueError, saying what to do instead, unless the folder contains one of these."""
        if self.contents not in allowed:
            by = f" (quant_method {quote(self.quant_method)} in config.json)" if self.quant_method else ""
            needed = ", or ".join(contents.value for contents in allowed)
            raise ValueError(
                f"{self.name} contains {self.contents.value}{by}; needed: {needed}; {_INSTEAD[self.contents]} [P073]"
            )

    def _contents(self) -> Contents:
        if self.files:
            return Contents.GGUF
        if self.config.get(RESIDUAL_KEY) or (self.folder / PISSA_RECORD).is_file():
            return Contents.RESIDUAL
        if (self.folder / _INITIAL_CONFIG).is_file():
            return Contents.PEFT_RESIDUAL
        if self.quant_method in RELEASED_METHODS:
            return Contents.RELEASED
        return {None: Contents.DENSE, "bitsandbytes": Contents.BITSANDBYTES}.get(self.quant_method, Contents.OTHER)


class Checkpoint(ModelFolder):
    """A model's folder with its weights, mapped, by the names and in the shapes of the dense model. A weight in codes
    is decoded when it is read; `coded` has the codes."""

    files_of = staticmethod(weight_files)

    def __init__(self, folder: Path, name: str | None = None, described: Path | None = None) -> None:
        source = None if model_file(folder) else Source(folder)
        super().__init__(folder, name, described)
        named = getattr(torch, str(self.config.get("dtype") or self.config.get("torch_dtype")), None)
        dtype = named if isinstance(named, torch.dtype) else torch.float32
        self.stored = source or GgufSource(self.files, self.model)
        """The tensors as they are stored."""
        if isinstance(self.stored, GgufSource):
            self.coded = self.stored.coded(dtype)
        else:
            self.coded = coded_weights(self.stored, dtype)
        """The weights that are stored in codes, by name."""
        if self.contents is Contents.RELEASED and not self.coded:
            said = f"config.json says {self.quant_method}"
            raise ValueError(f"{folder}: {said}, but there are no codes of a layout that is read")
        self.input_scales = scales_of_inputs(self.stored, self.coded)
        """Stored tensors that belong to codes but to no weight: scales of activations."""
        first = {weight.codes: name for name, weight in self.coded.items()}
        hidden = {tensor for weight in self.coded.values() for tensor in weight.tensors.values()}
        hidden -= first.keys()
        hidden |= set(self.input_scales)
        self.names = [first.get(tensor, tensor) for tensor in self.stored.names if tensor not in hidden]
        """The names of all tensors, file by file, in the order of their positions."""

    # -- tensors by name

    def stored_as(self, name: str) -> list[str]:
        """The stored tensors that make up the named one."""
        weight = self.coded.get(name)
        return [name] if weight is None else list(weight.tensors.values())

    def path_of(self, name: str) -> Path:
        return self.stored.path_of(self.stored_as(name)[0])

    def entry(self, name: str) -> Entry:
        """The tensor's dtype and shape; its place is that of its codes."""
        weight = self.coded.get(name)
        if weight is None:
            return self.stored.entry(name)
        size = math.prod(weight.shape) * weight.dtype.itemsize
        return Entry(weight.dtype, weight.shape, self.stored.entry(weight.codes).offset, size)

    def nbytes(self, name: str) -> int:
        """The number of bytes in the files that store the tensor."""
        return sum(self.stored.entry(tensor).nbytes for tensor in self.stored_as(name))

    def read(self, name: str, member: int | None = None) -> Tensor:
        """The tensor, or the one with that number in a stack: a view of the mapped file, or decoded."""
        weight = self.coded.get(name)
        return self.stored.read(name, member) if weight is None else weight.decode(member)

    def release(self, names: Sequence[str]) -> None:
        """Releases the memory of these tensors' pages; see `MappedFile.release`."""
        self.stored.release([tensor for name in names for tensor in self.stored_as(name)])

    def ahead(self, names: Sequence[str]) -> None:
        """Asks the system to read these tensors from the disk now. Returns at once."""
        self.stored.ahead([tensor for name in names for tensor in self.stored_as(name)])

    # -- parameters of the model

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model that config.json describes, on the meta device. It must not be changed."""
        return self.meta_model()

    @cached_property
    def composition(self) -> Composition:
        """Which tensors make each parameter of the model."""
        return Composition(self.model, self.names)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters and buffers of the model, without values, by all of their names."""
        model = self.model
        return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])

    def tied(self, parameter: str) -> list[str]:
        """The other names of a parameter that is tied."""
        value = self.tensors[parameter]
        return [name for name, other in self.tensors.items() if other is value and name != parameter]

    def parts_of(self, parameter: str, transposed: bool = False) -> tuple[Part, ...]:
        """The parts of the matrix [out, in] in a parameter, which is [in, out] if `transposed`. The checkpoint stores a
        tied parameter under one of its names.

        Raises:
            ValueError: the model has no such parameter, or transformers makes it of tensors in another way.
        """
        if parameter not in self.tensors:
            raise ValueError(f"the model in {self.folder} has no {parameter}")
        for name in (parameter, *self.tied(parameter)):
            with suppress(ValueError):
                return self.composition.matrix(name, transposed)
        return self.composition.matrix(parameter, transposed)

    def layers_of(self, parameter: str, transposed: bool = False) -> dict[str, tuple[Part, ...]]:
        """The layers whose weights are in a parameter, and their parts: one layer, or each of fused experts."""
        path, _, leaf = parameter.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf not in WEIGHTS or (stack := getattr(module, leaf)).dim() != 3:
            return {path: self.parts_of(parameter, transposed)}
        experts = self.composition.stack(parameter, len(stack), is_transposed(module))
        return {f"{path}.{index}.{leaf}": parts for index, parts in enumerate(experts)}

    def matrix(self, parts: Sequence[Part]) -> Tensor:
        """The matrix that these parts make, stacked by rows: a view of the mapped file if there is one dense part."""
        views = []
        for part in parts:
            matrix = self.read(part.tensor, part.member)
            views.append(matrix.mT if part.transposed else matrix)
        return views[0] if len(views) == 1 else torch.cat(views)

    def divide(self, matrix: Tensor, parts: Sequence[Part]) -> Iterator[tuple[str, Tensor, int | None]]:
        """The inverse of `matrix`: yields what a new matrix puts into the tensors of the parts, or into the given
        member of them if they are stacks."""
        row = 0
        for part in parts:
            shape = self.entry(part.tensor).shape[0 if part.member is None else 1 :]
            rows = matrix[row : row + shape[1 if part.transposed else 0]]
            row += len(rows)
            yield part.tensor, (rows.mT if part.transposed else rows).reshape(shape), part.member

    def codes(self, parts: Sequence[Part]) -> ops.QuantizedWeight:
        """The same in codes, for parts that are all stored so.

        Raises:
            ValueError: the codes would have to be cut or transposed.
        """
        weights = []
        for part in parts:
            weight = self.coded[part.tensor]
            if (part.member is not None) != weight.is_stack or part.transposed != weight.is_transposed:
                raise ValueError(f"{self.folder}: {part.tensor} is codes, which cannot be transposed or cut")
            weights.append(weight.read(part.member))
        return join_rows(weights)

    @cached_property
    def coded_parameters(self) -> dict[str, dict[str, tuple[Part, ...]]]:
        """The parameters of the model that are stored in codes, each with the parts of its layers, by their names with
        experts one by one.

        Raises:
            ValueError: a parameter consists of codes and other tensors, or is not a matrix.
        """
        coded: dict[str, dict[str, tuple[Part, ...]]] = {}
        parameters = dict(self.model.named_parameters()) if self.coded else {}
        for name, parameter in parameters.items():
            tensors = self.composition.tensors(name)
            if not tensors & self.coded.keys():
                continue
            if not tensors <= self.coded.keys() or parameter.dim() not in (2, 3):
                raise ValueError(f"{self.folder}: {name} has codes and other tensors, or is not a matrix")
            coded[name] = self.layers_of(name)
        for tensor in self.coded:  # `pissa init` stores each expert under the name that it has after unfusing
            layer = tensor.removesuffix(".weight")
            if (match := EXPERT.fullmatch(layer)) and (name := f"{match[1]}.{match[2]}") in parameters:
                coded.setdefault(name, {}).setdefault(layer, (Part(tensor),))
        return coded

    @property
    def coded_layers(self) -> dict[str, tuple[Part, ...]]:
        """The layers of the model that are stored in codes, with experts one by one, and their parts."""
        return {layer: parts for layers in self.coded_parameters.values() for layer, parts in layers.items()}


EXPERT = re.compile(rf"(.+)\.\d+\.({'|'.join(WEIGHTS)})")
"""The name of an expert's weight after unfusing."""


def initial_adapter(name: Name | None) -> Path | None:
    """The folder of the adapter before training in a residual that is on this machine, in a folder or in
    huggingface_hub's cache. Nothing is downloaded."""
    path = None if name is None else find_file(name, _INITIAL_CONFIG)
    return None if path is None else path.parent


def residual_around(initial: Path) -> ModelFolder | None:
    """The residual that contains this adapter before training."""
    folder = initial.resolve().parent
    is_inside = initial.name == INITIAL_FOLDER and has_model(folder)
    return ModelFolder(folder) if is_inside else None


def check_not_residual(model: nn.Module) -> None:
    """Raises ValueError for a model that transformers has loaded from a residual, as its configuration says, or the
    folder that it names."""
    config = getattr(model, "config", None)
    name = vars(model).get("name_or_path")
    initial = initial_adapter(name) if name else None
    residual = initial and residual_around(initial)
    if residual and residual.contents is Contents.PEFT_RESIDUAL:
        raise ValueError(
            f"the model in {name} is {Contents.PEFT_RESIDUAL.value}; {_INSTEAD[Contents.PEFT_RESIDUAL]}. If that "
            "adapter has been merged into it since, set model.name_or_path to the name of the model that was split "
            "[P074]"
        )
    if getattr(config, RESIDUAL_KEY, None):
        raise ValueError(
            f"the model in {getattr(config, 'name_or_path', None) or 'memory'} is a residual of `pissa init`, which "
            "lacks what its adapter starts from: use pissa.load(folder), which puts both together, or the model that "
            f"was split. If its adapter has been merged into it since, delete model.config.{RESIDUAL_KEY} [P074]"
        )
