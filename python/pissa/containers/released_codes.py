"""A checkpoint in the byte layout in which a model was released: which of the model's weights are codes, and these
codes, mapped from the files. `base.released` describes the layouts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pissa import ops
from pissa.base.released_layouts import BESIDE, CODES, OF_INPUTS, REFUSED, SCALES, is_code, joined, released_weight
from pissa.containers.messages import reading, shown
from pissa.containers.model_folder import CONFIG, Composition, Part, quantised_kind
from pissa.containers.tensor_file import Entry, Source
from pissa.layers.experts import is_transposed

KINDS = ("fp8", "mxfp4", "compressed-tensors", "modelopt")
"""The names of the quantisation of such a checkpoint in config.json (`quant_method`)."""


class ReleasedWeights:
    """The weights of a checkpoint that are codes, by the names that dense ones would have.

    Raises:
        ValueError: codes without scales. The message names the file.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._tensors: dict[str, dict[str, str]] = {}
        present = set(source.names)
        # bitsandbytes' codes have entries after their name ("q.weight.absmax"), or an SCB tensor.
        others = {f"{name.partition('.weight.')[0]}.weight" for name in present if ".weight." in name}
        others |= {f"{name.removesuffix('.SCB')}.weight" for name in present if name.endswith(".SCB")}
        for name in source.names:
            weight, _, local = _split(name)
            if local not in CODES or name in others or not is_code(local, source.entry(name).dtype):
                continue
            names = {local: name} | {
                other: found
                for other in (*CODES, *SCALES, *BESIDE, *REFUSED)
                if other != local and (found := _join(weight, other)) in present
            }
            if not any(other in names for other in SCALES):
                raise ValueError(
                    f"{source.path_of(name)}: {shown(name)} has no scales beside it ({', '.join(SCALES)}): a shard is "
                    "missing, or the checkpoint is of a layout that is not read"
                )
            self._tensors[weight] = names
        self._parts: dict[str, tuple[Part, ...]] = {}
        read = self.names | others
        for name in present - read:
            has_scale = any(f"{name}{ending}" in present for ending in _SCALE_ENDINGS)
            if source.entry(name).dtype in _FLOAT8 or (has_scale and not source.entry(name).dtype.is_floating_point):
                raise ValueError(f"{source.path_of(name)}: {shown(name)} has codes in a layout that is not read")

    def __bool__(self) -> bool:
        return bool(self._tensors)

    @property
    def tensors(self) -> dict[str, list[str]]:
        """The tensors of each weight."""
        return {weight: list(names.values()) for weight, names in self._tensors.items()}

    def codes_of(self, weight: str) -> str:
        """The tensor that contains the codes of a weight."""
        return next(self._tensors[weight][local] for local in CODES if local in self._tensors[weight])

    @property
    def names(self) -> set[str]:
        """The names of the checkpoint's tensors that belong to codes, including those for quantised activations."""
        own = {name for names in self._tensors.values() for name in names.values()}
        owners = {_owner(weight) for weight in self._tensors}
        return own | {name for name in self._source.names if _is_of_inputs(name, owners)}

    def locate(self, model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
        """Finds the parameters of a model on the meta device that are codes, and returns their names and shapes.
        Afterwards `layers` are known.

        Raises:
            ValueError: a parameter consists of codes and other tensors, or is not a matrix.
        """
        dense = (set(self._source.names) - self.names) | self._tensors.keys()
        composition = Composition(model, dense)
        found = {}
        for name, parameter in model.named_parameters():
            tensors = composition.tensors(name)
            if not tensors & self._tensors.keys():
                continue
            if not tensors <= self._tensors.keys() or parameter.dim() not in (2, 3):
                raise ValueError(f"{self._source.folder}: {name} has codes and other tensors, or is not a matrix")
            path, _, leaf = name.rpartition(".")
            if parameter.dim() == 2:
                self._parts[path] = composition.matrix(name, False)
            else:
                experts = composition.stack(name, len(parameter), is_transposed(model.get_submodule(path)))
                self._parts |= {f"{path}.{index}.{leaf}": parts for index, parts in enumerate(experts)}
            found[name] = tuple(parameter.shape)
        return found

    @property
    def layers(self) -> list[str]:
        """The layers whose weights are codes, with experts one by one."""
        return list(self._parts)

    def read(self, layer: str) -> ops.QuantizedWeight:
        """Reads the weight of a layer: views of the mapped files, unless several weights are joined.

        Raises:
            ValueError: the weight cannot be read. The message names tensor and file.
        """
        return joined([self._weight(part) for part in self._parts[layer]])

    def _weight(self, part: Part) -> ops.QuantizedWeight:
        # The matrices of a stack are stored as [out, in], although the dense ones are not.
        if (part.member is not None) != self.is_stack(part.tensor) or part.transposed != self.is_stack(part.tensor):
            raise ValueError(f"{self._source.folder}: {part.tensor} is codes, which cannot be transposed or cut")
        return self.weight(part.tensor, part.member)

    def is_stack(self, weight: str) -> bool:
        """Whether a weight is a stack of matrices: gpt-oss' experts."""
        return "blocks" in self._tensors[weight]

    def weight(self, weight: str, member: int | None = None) -> ops.QuantizedWeight:
        """One of the checkpoint's weights, or one matrix [out, in] of a stack."""
        names = self._tensors[weight]
        with _naming(self._source, names):
            return released_weight({local: self._source.read(name, member) for local, name in names.items()})

    def shape(self, weight: str) -> tuple[int, ...]:
        """The shape of the dense weight."""
        codes = self._source.entry(self.codes_of(weight))
        if self.is_stack(weight):
            experts, rows, blocks, half = (*codes.shape, 0, 0, 0, 0)[:4]
            return experts, 2 * blocks * half, rows
        rows, columns = (*codes.shape, 0, 0)[:2]
        return rows, columns * {torch.float8_e4m3fn: 1, torch.int32: 8}.get(codes.dtype, 2)


class DecodedSource(Source):
    """A checkpoint of released codes, read as the dense checkpoint that it represents. A weight is decoded when it is
    read, to bfloat16 as in the libraries."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(folder)
        self.raw = Source(folder)
        """The same checkpoint, undecoded."""
        self.codes = ReleasedWeights(self.raw)
        first = {tensors[0]: weight for weight, tensors in self.codes.tensors.items()}
        hidden = self.codes.names
        self._dense = [first.get(name, name) for name in super().names if name in first or name not in hidden]

    @property
    def names(self) -> list[str]:
        return list(self._dense)

    def path_of(self, name: str) -> Path:
        return super().path_of(self.held(name)[0])

    def entry(self, name: str) -> Entry:
        if name not in self.codes.tensors:
            return super().entry(name)
        shape = self.codes.shape(name)
        return Entry(torch.bfloat16, shape, super().entry(self.held(name)[0]).offset, 2 * math.prod(shape))

    def nbytes(self, name: str) -> int:
        return sum(self.raw.nbytes(tensor) for tensor in self.held(name))

    def format(self, name: str) -> str:
        if name not in self.codes.tensors:
            return super().format(name)
        return self.codes.weight(name, 0 if self.codes.is_stack(name) else None).format

    def read(self, name: str, member: int | None = None) -> Tensor:
        if name not in self.codes.tensors:
            return super().read(name, member)
        if not self.codes.is_stack(name):
            return ops.dequantize(self.codes.weight(name), torch.bfloat16)
        if member is not None:
            return ops.dequantize(self.codes.weight(name, member), torch.bfloat16).mT
        return torch.stack([self.read(name, member) for member in range(self.codes.shape(name)[0])])

    def release(self, names: Sequence[str]) -> None:
        held = [tensor for name in names for tensor in self.held(name)]
        super().release(held)
        self.raw.release(held)  # through which codes are read

    def ahead(self, names: Sequence[str]) -> None:
        super().ahead([tensor for name in names for tensor in self.held(name)])

    def close(self) -> None:
        super().close()
        self.raw.close()

    def held(self, name: str) -> list[str]:
        """The tensors of the checkpoint that make up the named one."""
        return self.codes.tensors.get(name, [name])


def open_dense(folder: str | os.PathLike[str]) -> Source:
    """A checkpoint whose weights can be read as dense ones, in whatever layout it is released."""
    source = Source(folder)
    return DecodedSource(folder) if ReleasedWeights(source) else source


def is_released(folder: Path) -> bool:
    """Whether a folder's config.json declares its weights as codes of a released model."""
    return (folder / CONFIG).is_file() and quantised_kind(folder) in KINDS


def check_dense(source: Source) -> None:
    """Raises ValueError unless the weights of a checkpoint can be read as dense ones."""
    kind = None if isinstance(source, DecodedSource) else quantised_kind(source.folder)
    if kind is not None:
        raise ValueError(
            f"{source.folder} is quantised already ({kind}, quantization_config in config.json); needed: the "
            f"checkpoint in 16 or 32 bits, or as it was released in {', '.join(KINDS)}"
        )


@contextmanager
def _naming(source: Source, names: dict[str, str]) -> Iterator[None]:
    """Puts the file and the full name before the tensor name at the beginning of a message."""
    first = next(iter(names.values()))
    with reading(source.path_of(first), "It is damaged, or of a layout that is not read: download it again"):
        try:
            yield
        except ValueError as error:
            local = str(error).partition(":")[0].partition(" ")[0]
            raise ValueError(f"{shown(names.get(local, first))}: {error}") from error


_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALE_ENDINGS = ("_scale", "_scale_inv", "_scale_2", "_scales")

_STACKS = {"_blocks": "blocks", "_scales": "scales"}
"""The suffixes of gpt-oss."""


def _split(name: str) -> tuple[str, str, str]:
    """Splits a tensor's name into that of the dense weight, the separator and the local name."""
    for ending, local in _STACKS.items():
        if name.endswith(ending):
            return name.removesuffix(ending), "_", local
    owner, _, local = name.rpartition(".")
    return f"{owner}.weight", ".", local


def _join(weight: str, local: str) -> str:
    """The inverse of `_split`."""
    for ending, other in _STACKS.items():
        if local == other:
            return f"{weight}{ending}"
    return f"{_owner(weight)}.{local}"


def _owner(weight: str) -> str:
    return weight.removesuffix(".weight")


def _is_of_inputs(name: str, owners: set[str]) -> bool:
    owner, _, local = name.rpartition(".")
    return local in OF_INPUTS and (owner in owners or local in ("k_scale", "v_scale"))
