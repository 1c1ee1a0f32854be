"""Safetensors files with a checksum, checked by their header before a tensor of them is read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from pissa.base.digest import bytes_of, xxh3
from pissa.files.messages import reading, shown
from pissa.files.safetensors_header import DTYPES, Layout
from pissa.ops.checks import FLOATS

SAVED_FLOATS = (*FLOATS, torch.float64)
"""The dtypes in which a file may hold real numbers."""

_CHECKSUMS = "xxh3"
"""The entry in a file's metadata with the XXH3-128 of each tensor, in the order of their names."""

_REMEDY = "It is damaged, or not a safetensors file, the only kind that is read"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file with checksums: the same bytes for the same tensors, in safetensors' order. They are
    taken from the mapping one at a time, each twice. A file that is there is replaced: they may be views of it."""
    kinds, checksums = {}, []
    for name in sorted(tensors):
        tensor = tensors[name]
        kinds[name] = tensor.dtype, tuple(tensor.shape)
        checksums.append(xxh3(tensor))
    order = sorted(kinds, key=lambda name: list(DTYPES.values()).index(kinds[name][0]))
    layout = Layout({name: kinds[name] for name in order}, {"format": "pt", _CHECKSUMS: " ".join(checksums)})
    path.unlink(missing_ok=True)  # not written over: the tensors may be views of it
    with open(path, "wb") as file:
        file.write(layout.header)
        for name in layout.names:
            file.write(bytes_of(tensors[name].detach().cpu().contiguous()))


class TensorFile:
    """The tensors of a safetensors file. Its header is read at once, a tensor's values on demand, and compared with
    their checksum if the file has checksums.

    safetensors guarantees that the tensors fill the file exactly, so a header cannot make us allocate more than the
    file holds.

    Raises:
        ValueError: no such file, or a damaged one, or one that is not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not os.path.isfile(path):  # a pipe would be waited for
            found = "not a regular file" if os.path.lexists(path) else "missing"
            raise ValueError(f"{path} is {found}{_pickle_beside(path)}")
        with reading(path, _REMEDY):
            self._file = cast(Any, safe_open(path, "pt"))  # it has no types
        self._declared = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
        checksums = (self._file.metadata() or {}).get(_CHECKSUMS, "").split(" ")
        self._checksums = dict(zip(sorted(self._declared), checksums, strict=False))
        self._has_checksums = len(checksums) == len(self._declared)

    @property
    def names(self) -> list[str]:
        """The names of the tensors, in the order of the file."""
        return list(self._declared)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor of that name."""
        return tuple(self._declared[name].get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the tensor of that name.

        Raises:
            ValueError: elements that are not whole bytes.
        """
        dtype = self._declared[name].get_dtype()
        if dtype not in DTYPES:
            raise ValueError(
                f"{self.path}: tensor {shown(name)} has the dtype {shown(dtype)}; known: {', '.join(DTYPES)}"
            )
        return DTYPES[dtype]

    def expect(self, name: str, shape: Sequence[int], dtypes: Sequence[torch.dtype], demand: str) -> None:
        """Checks that the file has a tensor of that shape and of one of these dtypes.

        Args:
            demand: the part of the model that needs the tensor, for the message.

        Raises:
            ValueError: naming the file, the tensor and `demand`.
        """
        if name not in self._declared:
            raise ValueError(f"{self.path}: tensor {shown(name)} is missing, of {demand}")
        declared = self._declared[name]
        dtype, found = DTYPES.get(declared.get_dtype(), declared.get_dtype()), list(declared.get_shape())
        if dtype not in dtypes or found != list(shape):
            allowed = " or ".join(map(str, dtypes))
            raise ValueError(
                f"{self.path}: tensor {shown(name)} is {dtype} {found}, expected {allowed} {list(shape)}, for {demand}"
            )

    def expect_checksums(self) -> None:
        """Raises ValueError, naming the file, unless it has a checksum of every tensor."""
        if not self._has_checksums:
            raise ValueError(
                f"{self.path} has no checksums of its {len(self._declared)} tensors: save_pretrained did not write it; "
                "save the adapter again, or take the file from a copy"
            )

    def read(self, name: str) -> Tensor:
        """A copy of the tensor: later changes of the file do not change it.

        Raises:
            ValueError: it is not, bit for bit, the one that was written, or holds NaN or Inf; the message names file
                and tensor.
        """
        with reading(self.path, _REMEDY):
            tensor: Tensor = self._file.get_tensor(name).clone()
        if self._has_checksums and xxh3(tensor) != self._checksums[name]:
            raise ValueError(
                f"{self.path}: tensor {shown(name)} is damaged: its checksum is not the one that was written; save "
                "the adapter again, or take the file from a copy"
            )
        values = tensor if tensor.dtype in SAVED_FLOATS else tensor.float()  # torch asks no float8 whether it is finite
        if tensor.is_floating_point() and not torch.isfinite(values).all():
            raise ValueError(f"{self.path}: tensor {shown(name)} holds NaN or Inf")
        return tensor


def _pickle_beside(path: Path) -> str:
    pickle = path.with_suffix(".bin")
    return f"; {pickle.name}, beside it, is a pickle, which is never read" if os.path.lexists(pickle) else ""
