"""Mapped files: whether a tensor is in one, and how one is written again on Windows, which refuses to write a file that
is mapped."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import safetensors.torch
from torch import Tensor


def unmap_unused() -> None:
    """Lets the files go that only models and errors have mapped which wait to be collected."""
    if sys.platform == "win32":
        gc.collect()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that is written again: not mapped, and by nothing unused either."""
    unmap_unused()
    return safetensors.torch.load(path.read_bytes())


def is_mapped(tensor: Tensor, path: Path) -> bool:
    """Whether the tensor is in memory where that file is mapped."""
    address = tensor.data_ptr()
    if sys.platform == "win32":
        name, this_process = ctypes.create_unicode_buffer(1024), ctypes.c_void_p(-1)
        ctypes.windll.kernel32.K32GetMappedFileNameW(this_process, ctypes.c_void_p(address), name, len(name))
        return name.value.endswith(str(path).removeprefix(path.drive))  # after its own name for the drive
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            return line.endswith(str(path))
    return False
