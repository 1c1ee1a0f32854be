"""Tensors that wait on the disk until all of them are known."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from pissa.base.digest import bytes_of


class Scratch(Mapping[str, Tensor]):
    """Tensors by name, each read from the disk when it is asked for. Their file has no name: it is gone when the block
    ends, or the process.

    Args:
        folder: on whose disk they are.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by __exit__
        self._places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        """Takes the values of a contiguous tensor on the CPU.

        Raises:
            OSError: the disk is full.
        """
        self._places[name] = self._file.seek(0, os.SEEK_END), tensor.dtype, tuple(tensor.shape)
        self._file.write(bytes_of(tensor))

    def __getitem__(self, name: str) -> Tensor:
        place, dtype, shape = self._places[name]
        content = torch.empty(math.prod(shape), dtype=dtype)
        self._file.seek(place)
        self._file.readinto(bytes_of(content))
        return content.view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __enter__(self) -> Scratch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
