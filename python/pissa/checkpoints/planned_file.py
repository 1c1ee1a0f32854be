"""A safetensors file whose header is written before any value is known: its tensors come in any order, from several
processes."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pissa.files.messages import shown
from pissa.files.staged import flush_folder
from pissa.files.tensor_file import Layout

_CHUNK = 1 << 26
"""Bytes that are written by one call, or copied at once."""


def create(files: Mapping[Path, Layout]) -> None:
    """Makes the files: the whole of each on the disk, so that a full disk shows before anything is computed. What one
    that is there holds already is kept. Not to be called by two processes at once.

    Raises:
        OSError: the disk is full, or cannot be written to; the message says how much is needed.
    """
    missing = {path: max(0, layout.size - _size(path)) for path, layout in files.items()}
    for path, layout in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if missing[path]:
                os.posix_fallocate(handle, 0, layout.size)
            _write(handle, layout.header, 0)
        except OSError as error:
            raise _no_room(error, path, sum(missing.values()), free) from error
        finally:
            os.close(handle)
        missing[path] = 0
    for folder in {path.parent for path in files}:
        flush_folder(folder)


def is_finished(path: Path, layout: Layout) -> bool:
    """Whether the file is there, with the size and the header of the plan."""
    try:
        with open(path, "rb") as file:
            return _size(path) == layout.size and file.read(len(layout.header)) == layout.header
    except FileNotFoundError:
        return False


class PlannedFile:
    """A file that `create` has made, open for writing. Several processes may write to it, and several threads.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self._layout = layout
        self._handle = os.open(path, os.O_RDWR)

    def write(self, name: str, tensor: Tensor, first: int | None = None) -> None:
        """Writes a tensor, or some of its rows (along dimension 0).

        Args:
            tensor: of the planned dtype and shape; if `first` is given, fewer rows will do.
            first: the row of the whole tensor that the first of these is.

        Raises:
            ValueError: no such tensor, another dtype or another shape.
            OSError: the disk is full after all, or fails.
        """
        if name not in self._layout.entries:
            raise ValueError(f"{self.path}: no tensor {shown(name)} is planned")
        entry = self._layout.entries[name]
        whole, given = list(entry.shape), list(tensor.shape)
        if first is None:
            fits, start = given == whole, entry.offset
        else:
            fits = len(given) == len(whole) > 0 and given[1:] == whole[1:] and 0 <= first <= whole[0] - given[0]
            start = entry.offset + first * entry.dtype.itemsize * math.prod(whole[1:])
        if tensor.dtype != entry.dtype or not fits:
            rows = "" if first is None else f" from row {first} on"
            raise ValueError(
                f"{self.path}: tensor {shown(name)}: got {tensor.dtype} {given}{rows}; planned: {entry.dtype} {whole}"
            )
        try:
            for part in _parts(tensor.detach()):
                start = _write(self._handle, part, start)
        except OSError as error:
            raise _no_room(error, self.path, tensor.nbytes, shutil.disk_usage(self.path.parent).free) from error

    def flush(self) -> None:
        """Waits until what this process has written is on the disk."""
        os.fdatasync(self._handle)

    def close(self) -> None:
        """Closes the file, which need not be complete."""
        os.close(self._handle)


def _parts(tensor: Tensor) -> Iterable[memoryview]:
    """The bytes of the tensor, in order. What is not contiguous is copied bit by bit."""
    if tensor.numel() == 0:
        return
    if tensor.is_contiguous() and tensor.device.type == "cpu":
        # as_strided: a single element may have any stride
        yield tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data
    elif tensor.nbytes <= _CHUNK or tensor.dim() == 0:
        yield from _parts(tensor.cpu().contiguous())
    else:
        rows = max(1, _CHUNK * tensor.shape[0] // tensor.nbytes)
        for begin in range(0, tensor.shape[0], rows):
            part = tensor[begin : begin + rows]
            yield from _parts(part if len(tensor) > 1 else part[0])


def _write(handle: int, content: bytes | memoryview, start: int) -> int:
    """Writes all of it; returns the offset behind it."""
    left = memoryview(content)
    while left:
        written = os.pwrite(handle, left[:_CHUNK], start)
        start, left = start + written, left[written:]
    return start


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _no_room(error: OSError, path: Path, needed: int, free: int) -> OSError:
    """The same error as one line that says what to do."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OSError(f"{path} cannot be written: {error.strerror}")
    return OSError(
        f"{path} cannot be written ({error.strerror}): {needed / 1e9:.3g} GB are needed, and {free / 1e9:.3g} GB free "
        "there: make room, or take a folder on another disk"
    )
