"""A model's folder of safetensors, mapped: its headers are checked at once, its values read where they are used."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pissa.base.digest import xxh3_of_text
from pissa.files.messages import read_object, reading, shown
from pissa.files.safetensors_header import Entry, read_entries

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_REMEDY = "It is damaged, incomplete or no safetensors file: download or copy it again"


_SHARD = re.compile(r"[^/]+\.safetensors")
"""The name of a file in the same folder: what is written has shards of these names, too."""


class _State(NamedTuple):
    """A file as it was when its header was read. Other values: somebody has written to it, or replaced it."""

    size: int
    mtime_ns: int
    inode: int

    @staticmethod
    def of(path: Path) -> _State:
        found = os.stat(path)
        return _State(found.st_size, found.st_mtime_ns, found.st_ino)


class Source:
    """The tensors of a checkpoint, by their names: those of `model.safetensors`, or of an index with its shards.

    A file is mapped when a tensor of it is first read. The mapping is private to this process: who writes to a tensor
    by mistake changes a copy, never the file.

    A file must not become shorter while it is mapped: the system kills a process (SIGBUS) that reads a page which is
    gone. `read` looks at each file right before; nobody can for the time after.
    """

    def __init__(self, folder: Path, index: Path | None, entries: dict[str, Entry], states: dict[Path, _State]) -> None:
        self.folder = folder
        self.index = index
        """The index, if the checkpoint has one."""
        self._entries = entries
        self._states = states
        self._maps: dict[Path, mmap.mmap] = {}

    @staticmethod
    def open(folder: str | os.PathLike[str]) -> Source:
        """Reads the index and every header.

        Raises:
            ValueError: no such folder, no safetensors in it, or a file that is missing, damaged or unreadable; the
                message names the file, and the tensor if one is at fault.
        """
        folder = Path(folder)
        index = _index(folder)
        files = {WEIGHTS: set[str]()} if index is None else _shards(index)
        entries: dict[str, Entry] = {}
        states: dict[Path, _State] = {}
        for name, promised in sorted(files.items()):
            path = folder / name
            found_here = _checked(path, states)
            if lacking := sorted(promised - found_here.keys()):
                raise ValueError(
                    f"{path}: tensor {shown(lacking[0])} is missing, which {INDEX} says is there: the files do not "
                    "belong together; download or copy them again"
                )
            if twice := sorted(entries.keys() & found_here.keys()):
                raise ValueError(
                    f"{path}: tensor {shown(twice[0])} is in {entries[twice[0]].path.name} too: the files do not "
                    "belong together; download or copy them again"
                )
            entries |= found_here
        return Source(folder, index, entries, states)

    @property
    def names(self) -> list[str]:
        """The names of all tensors: file by file, as they lie there."""
        return list(self._entries)

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return list(self._states)

    def entry(self, name: str) -> Entry:
        """Where the tensor lies, its dtype and its shape.

        Raises:
            ValueError: no such tensor.
        """
        if name not in self._entries:
            raise ValueError(f"{self.folder} has no tensor {shown(name)}")
        return self._entries[name]

    def identity(self) -> dict[str, str]:
        """For each file its size, its time of change, and a fingerprint of what its header says."""
        headers = dict.fromkeys(self._states, "")
        for name, entry in self._entries.items():
            headers[entry.path] += f"{name} {entry.dtype} {entry.shape} {entry.offset}\n"
        return {
            path.name: f"{state.size} bytes, {state.mtime_ns} ns, {xxh3_of_text(headers[path])}"
            for path, state in self._states.items()
        }

    def read(self, name: str) -> Tensor:
        """The tensor, whose values are the mapped file's; a copy if it is not aligned in the file to its elements.

        It must not be written to. It keeps the mapping alive, also after `close`.

        Raises:
            ValueError: the file has changed since its header was read.
        """
        entry = self.entry(name)
        mapped = self._mapped(entry.path)
        with reading(entry.path, _REMEDY):
            if entry.nbytes == 0:
                return torch.empty(entry.shape, dtype=entry.dtype)
            if entry.offset % entry.dtype.itemsize == 0:
                count = entry.nbytes // entry.dtype.itemsize
                return torch.frombuffer(mapped, dtype=entry.dtype, count=count, offset=entry.offset).view(entry.shape)
            with memoryview(mapped) as view, view[entry.offset : entry.offset + entry.nbytes] as part:
                return torch.frombuffer(bytearray(part), dtype=entry.dtype).view(entry.shape)

    def release(self, names: Sequence[str]) -> None:
        """Gives back the memory that these tensors' pages take; it is read again when it is used again.

        A page that a tensor shares with one that is not named stays.
        """
        for path, begin, end in self._ranges(names):
            if mapped := self._maps.get(path):
                begin += -begin % mmap.PAGESIZE
                end -= end % mmap.PAGESIZE if end < len(mapped) else 0
                if begin < end:
                    mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def ahead(self, names: Sequence[str]) -> None:
        """Asks the system to read these tensors from the disk now; returns at once."""
        for path, begin, end in self._ranges(names):
            # madvise would do the same, but keep Python's other threads waiting.
            with suppress(OSError), open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Lets the mappings go. One that a tensor still needs goes with the tensor."""
        self._maps.clear()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _mapped(self, path: Path) -> mmap.mmap:
        try:
            state = _State.of(path)
            if state == self._states[path] and path not in self._maps:
                with open(path, "rb") as file:
                    # Writable, as torch wants it, but private: without a reserve the system sets no memory aside.
                    flags, access = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                    mapped = mmap.mmap(file.fileno(), state.size, flags=flags, prot=access)
                    self._maps.setdefault(path, mapped)  # another thread may have been faster
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read any more: {error}") from error
        if state != self._states[path]:
            raise ValueError(
                f"{path} has changed since its header was read (it had {self._states[path].size} bytes, now "
                f"{state.size}): start again when nobody writes to it"
            )
        return self._maps[path]

    def _ranges(self, names: Sequence[str]) -> Iterator[tuple[Path, int, int]]:
        """The bytes of these tensors, in as few ranges as possible."""
        last: tuple[Path, int, int] | None = None
        for entry in sorted((self.entry(name) for name in names), key=lambda entry: (entry.path, entry.offset)):
            begin, end = entry.offset, entry.offset + entry.nbytes
            if last is not None and last[0] == entry.path and last[2] == begin:
                last = (entry.path, last[1], end)
            else:
                if last is not None:
                    yield last
                last = (entry.path, begin, end)
        if last is not None:
            yield last


_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Python names it since 3.13."""


def _checked(path: Path, states: dict[Path, _State]) -> dict[str, Entry]:
    if not os.path.isfile(path):  # a pipe would be waited for
        found = "not a regular file" if os.path.exists(path) else "missing"
        if os.path.islink(path):
            found = f"a link to {os.readlink(path)}, which is {found}"
        raise ValueError(f"{path} is {found}: download or copy the checkpoint again")
    with reading(path, _REMEDY):
        states[path] = _State.of(path)
        return read_entries(path)


def _index(folder: Path) -> Path | None:
    """The path of the index; None if there is one file, model.safetensors."""
    needed = f"needed: a folder with {WEIGHTS}, or with {INDEX} and its shards"
    if not os.path.isdir(folder):
        found = "is not a folder" if os.path.lexists(folder) else "is missing"
        raise ValueError(f"{folder} {found}; {needed}; a model of the Hub is downloaded first")
    if os.path.lexists(folder / WEIGHTS):
        return None
    if os.path.lexists(folder / INDEX):
        return folder / INDEX
    try:
        found_names = sorted(os.listdir(folder))
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror}") from error
    raise ValueError(f"{folder} holds neither {WEIGHTS} nor {INDEX}{_instead(found_names)}; {needed}")


def _instead(names: list[str]) -> str:
    """What is there instead, and what can be done with it."""
    for endings, what in (
        ((".safetensors",), f"of which {INDEX} would say what they hold"),
        ((".gguf",), "GGUF, which is made from a checkpoint and is not read: take the checkpoint"),
        (
            (".bin", ".pt", ".pth", ".ckpt"),
            "pickles, which are never read: take a revision with safetensors, or convert them where you trust them",
        ),
    ):
        if found := [name for name in names if name.endswith(endings)]:
            return f", but {found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''}: {what}"
    return ""


def _shards(index: Path) -> dict[str, set[str]]:
    """The shards that the index names, each with the tensors that should be in it."""
    with reading(index, "It is damaged: download or copy it again"):
        files = dict(read_object(index)["weight_map"])
        if not all(isinstance(file, str) for file in files.values()):
            raise ValueError("weight_map has something else than names of files")
        if not files:
            raise ValueError("weight_map names no tensor")
    shards: dict[str, set[str]] = {}
    for name, file in files.items():
        if not _SHARD.fullmatch(file):
            raise ValueError(
                f"{index} says that tensor {shown(name)} is in {shown(file)}; allowed: a .safetensors file in the same "
                "folder: download or copy the index again"
            )
        shards.setdefault(file, set()).add(name)
    return shards
