"""Weights that a checkpoint stores in codes: which of its tensors make each of them, mapped from the files.
`base.released_layouts` describes the layouts of released models, `base.bitsandbytes_state` those of bitsandbytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pissa import ops
from pissa.base.bitsandbytes_state import ENTRIES, from_state
from pissa.base.released_layouts import BESIDE, CODES, OF_INPUTS, REFUSED, SCALES, is_code, released_weight
from pissa.containers.messages import file_errors, quote
from pissa.containers.tensor_file import Source


@dataclass(frozen=True)
class CodedWeight(ABC):
    """A weight, or a stack of weights, that a checkpoint stores in codes."""

    source: Source
    tensors: Mapping[str, str]
    """The checkpoint's tensors by their names in the layout, the codes first."""
    dtype: torch.dtype
    """The dtype in which the weight is decoded."""

    @property
    def codes(self) -> str:
        """The tensor that contains the codes."""
        return next(iter(self.tensors.values()))

    @property
    def is_stack(self) -> bool:
        """Whether it is a stack of matrices."""
        return False

    @property
    def is_transposed(self) -> bool:
        """Whether the dense weight is [..., in, out]. The codes are those of [..., out, in]."""
        return self.is_stack

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense weight."""

    @abstractmethod
    def _quantized(self, parts: Mapping[str, Tensor]) -> ops.QuantizedWeight:
        """The weight for its tensors, by their names in the layout. Raises ValueError; the text begins with a name."""

    def read(self, member: int | None = None) -> ops.QuantizedWeight:
        """Returns the matrix [out, in], or that with a number in a stack: views of the mapped files.

        Raises:
            ValueError: the tensors do not fit each other. The message names tensor and file.
        """
        path = self.source.path_of(self.codes)
        with file_errors(path, "It is damaged, or of a layout that is not read: download it again"):
            try:
                return self._quantized({local: self.source.read(name, member) for local, name in self.tensors.items()})
            except ValueError as error:
                local = str(error).partition(":")[0].partition(" ")[0]
                raise ValueError(f"{quote(self.tensors.get(local, self.codes))}: {error}") from error

    def decode(self, member: int | None = None) -> Tensor:
        """Returns the dense weight, or one matrix of the stack, as the checkpoint of the dense model would have it."""
        if member is not None or not self.is_stack:
            matrix = ops.dequantize(self.read(member), self.dtype)
            return matrix.mT if self.is_transposed else matrix
        return torch.stack([self.decode(member) for member in range(self.shape[0])])


class ReleasedWeight(CodedWeight):
    """A weight in the layout in which a model was released. The libraries decode it to bfloat16."""

    @property
    def is_stack(self) -> bool:
        return "blocks" in self.tensors  # gpt-oss' experts

    @property
    def shape(self) -> tuple[int, ...]:
        codes = self.source.entry(self.codes)
        if self.is_stack:
            experts, rows, blocks, half = (*codes.shape, 0, 0, 0, 0)[:4]
            return experts, 2 * blocks * half, rows
        rows, columns = (*codes.shape, 0, 0)[:2]
        return rows, columns * {torch.float8_e4m3fn: 1, torch.int32: 8}.get(codes.dtype, 2)

    def _quantized(self, parts: Mapping[str, Tensor]) -> ops.QuantizedWeight:
        return released_weight(parts)


class BitsandbytesWeight(CodedWeight):
    """A weight that bitsandbytes has quantised, or `pissa init` in its layout."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.read().shape

    def entries(self) -> dict[str, Tensor]:
        """The entries of its state dict, as `base.bitsandbytes` takes them: views of the mapped files."""
        return {entry: self.source.read(name) for entry, name in self.tensors.items()}

    def _quantized(self, parts: Mapping[str, Tensor]) -> ops.QuantizedWeight:
        return from_state(parts)


def coded_weights(source: Source, dtype: torch.dtype) -> dict[str, CodedWeight]:
    """Returns the weights that are codes, by the names that dense ones would have. `dtype` is that of the dense model.

    Raises:
        ValueError: codes without scales or another part of their set, or in an unknown layout. The message names the
            file.
    """
    coded: dict[str, CodedWeight] = {}
    present = set(source.names)
    for name in source.names:
        for mark, entries in ENTRIES.items():
            if mark in name:
                layer = name.partition(mark)[0]
                tensors = {entry: f"{layer}.{entry}" for entry in entries if f"{layer}.{entry}" in present}
                coded[f"{layer}.weight"] = BitsandbytesWeight(source, tensors, dtype)
    for weight in coded.values():
        _ = weight.shape  # reads what is beside the codes: a set is not even copied if a part of it is missing
    known = {tensor for weight in coded.values() for tensor in weight.tensors.values()}
    for name in source.names:
        owner, local = _split(name)
        if local not in CODES or name in known or not is_code(local, source.entry(name).dtype):
            continue
        others = (other for other in (*CODES, *SCALES, *BESIDE, *REFUSED) if other != local)
        tensors = {local: name} | {other: full for other in others if (full := _join(owner, other)) in present}
        if not any(other in tensors for other in SCALES):
            raise ValueError(
                f"{source.path_of(name)}: {quote(name)} has no scales beside it ({', '.join(SCALES)}): a shard is "
                "missing, or the checkpoint is of a layout that is not read [P076]"
            )
        coded[owner] = ReleasedWeight(source, tensors, torch.bfloat16)
        known |= set(tensors.values())
    for name in present - known - set(scales_of_inputs(source, coded)):
        has_scale = any(f"{name}{ending}" in present for ending in _SCALE_ENDINGS)
        if source.entry(name).dtype in _FLOAT8 or (has_scale and not source.entry(name).dtype.is_floating_point):
            raise ValueError(f"{source.path_of(name)}: {quote(name)} has codes in a layout that is not read")
    return coded


def scales_of_inputs(source: Source, coded: Mapping[str, CodedWeight]) -> list[str]:
    """The checkpoint's tensors for kernels that also quantise activations. Nothing here reads them."""
    if not coded:
        return []
    owners = {weight.removesuffix(".weight") for weight in coded}
    split = ((name, *name.rpartition(".")[::2]) for name in source.names)
    return [
        name for name, owner, local in split if local in OF_INPUTS and (owner in owners or local in _SCALES_OF_CACHE)
    ]


_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALE_ENDINGS = ("_scale", "_scale_inv", "_scale_2", "_scales")
_SCALES_OF_CACHE = ("k_scale", "v_scale")

_STACKS = {"_blocks": "blocks", "_scales": "scales"}
"""The suffixes of gpt-oss."""


def _split(name: str) -> tuple[str, str]:
    """Splits a tensor's name into that of the dense weight and the local name."""
    for ending, local in _STACKS.items():
        if name.endswith(ending):
            return name.removesuffix(ending), local
    owner, _, local = name.rpartition(".")
    return f"{owner}.weight", local


def _join(weight: str, local: str) -> str:
    """The inverse of `_split`."""
    for ending, other in _STACKS.items():
        if local == other:
            return f"{weight}{ending}"
    return f"{weight.removesuffix('.weight')}.{local}"
