"""Calls of the operating system taken away, one by one, as on the systems that lack them (python/pissa/system.py).
Processes that a test starts keep them."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

MACOS = ("posix_fallocate", "posix_fadvise", "fdatasync", "/proc")
"""What macOS lacks. Windows lacks all."""

ATTRIBUTES = {
    "posix_fallocate": (os, "posix_fallocate"),
    "posix_fadvise": (os, "posix_fadvise"),
    "fdatasync": (os, "fdatasync"),
    "O_DIRECTORY": (os, "O_DIRECTORY"),  # to open folders
    "pwrite": (os, "pwrite"),
    "getloadavg": (os, "getloadavg"),
    "MAP_PRIVATE": (mmap, "MAP_PRIVATE"),
    "MADV_DONTNEED": (mmap, "MADV_DONTNEED"),
}
MODULES = ("fcntl", "resource")
CALLS = (*ATTRIBUTES, *MODULES, "/proc", "unlinked")
"""All of them. "unlinked": an open file cannot be removed."""

LACKING = {*CALLS, "fork", "mkfifo", "symlink", "torchrun"} - {"fcntl"} if sys.platform == "win32" else set()
"""What this system lacks, with calls that only tests use. Windows has locks of its own, and lets only administrators
make symbolic links; torch is built without libuv there, with which torchrun starts."""


def take_away(calls: Iterable[str], patch: pytest.MonkeyPatch) -> None:
    """Takes away calls of that list, until `patch` is undone."""
    for call in calls:
        if call in ATTRIBUTES:
            patch.delattr(*ATTRIBUTES[call], raising=False)
        elif call in MODULES:
            patch.setitem(sys.modules, call, None)
        elif call == "/proc":
            patch.setattr("pissa.system.Path", lambda path: Path("/missing"))
        else:
            _keep_open_files(patch)


def _keep_open_files(patch: pytest.MonkeyPatch) -> None:
    """Windows refuses to remove a file that is open, but for a temporary one, which it removes when it is closed. It
    refuses the same for mapped files, and to rename either: that is not imitated."""
    unlink = os.unlink

    def refuse(path: Any, *, dir_fd: int | None = None) -> None:
        if os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_ino in _open_files():
            raise PermissionError(13, "The process cannot access the file because it is being used", os.fspath(path))
        unlink(path, dir_fd=dir_fd)

    patch.setattr(os, "unlink", refuse)
    patch.setattr(os, "remove", refuse)
    patch.setattr(tempfile, "TemporaryFile", tempfile.NamedTemporaryFile)


def _open_files() -> set[int]:
    """The numbers of the files that this process has open, and not only mapped: Python keeps those open."""
    numbers = set()
    for handle in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # that of the listing
            numbers.add(os.fstat(handle).st_ino)
    mapped = {int(line.split()[4]) for line in Path("/proc/self/maps").read_text().splitlines()}
    return numbers - mapped
