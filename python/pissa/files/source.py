"""A model's folder of safetensors: its headers are checked at once, its values read where they are used."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pissa.files.messages import read_object, reading, shown
from pissa.files.tensor_file import Entry, MappedFile

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt")
"""The endings of files with weights."""

_SHARD = re.compile(r"[^/]+\.safetensors")
"""The name of a file in the same folder: what is written has shards of these names, too."""


class Source:
    """The tensors of a checkpoint, by their names: those of `model.safetensors`, or of an index with its shards.

    Args:
        index: its path, if the checkpoint has one.
    """

    def __init__(self, folder: Path, index: Path | None, files: Sequence[MappedFile]) -> None:
        self.folder, self.index = folder, index
        self._files = {file.path: file for file in files}
        self._holders = {name: file for file in files for name in file.entries}

    @staticmethod
    def open(folder: str | os.PathLike[str]) -> Source:
        """Reads the index and every header.

        Raises:
            ValueError: no such folder, no safetensors in it, or a file that is missing, damaged or unreadable; the
                message names the file, and the tensor if one is at fault.
        """
        folder = Path(folder)
        index = _index(folder)
        shards = {WEIGHTS: set[str]()} if index is None else _shards(index)
        files: list[MappedFile] = []
        for name, promised in sorted(shards.items()):
            file = MappedFile(folder / name)
            if lacking := sorted(promised - file.entries.keys()):
                raise ValueError(
                    f"{file.path}: tensor {shown(lacking[0])} is missing, which {INDEX} says is there: the files do "
                    "not belong together; download or copy them again"
                )
            for other in files:
                if twice := sorted(file.entries.keys() & other.entries.keys()):
                    raise ValueError(
                        f"{file.path}: tensor {shown(twice[0])} is in {other.path.name} too: the files do not belong "
                        "together; download or copy them again"
                    )
            files.append(file)
        return Source(folder, index, files)

    @property
    def names(self) -> list[str]:
        """The names of all tensors: file by file, as they lie there."""
        return list(self._holders)

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return list(self._files)

    def path_of(self, name: str) -> Path:
        """The file of a tensor."""
        return self._holder(name).path

    def entry(self, name: str) -> Entry:
        """Where the tensor lies, its dtype and its shape.

        Raises:
            ValueError: no such tensor.
        """
        return self._holder(name).entries[name]

    def identity(self) -> dict[str, str]:
        """For each file its size, its time of change, and a fingerprint of its header."""
        return {path.name: file.identity for path, file in self._files.items()}

    def read(self, name: str) -> Tensor:
        """The tensor: see `MappedFile.view`."""
        return self._holder(name).view(name)

    def release(self, names: Sequence[str]) -> None:
        """Gives back the memory that these tensors' pages take: see `MappedFile.release`."""
        for file in self._holding(names):
            file.release([name for name in names if name in file.entries])

    def ahead(self, names: Sequence[str]) -> None:
        """Asks the system to read these tensors from the disk now; returns at once."""
        for file in self._holding(names):
            file.ahead([name for name in names if name in file.entries])

    def close(self) -> None:
        """Lets the mappings go. One that a tensor still needs goes with the tensor."""
        self._files.clear()
        self._holders.clear()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _holder(self, name: str) -> MappedFile:
        if name not in self._holders:
            raise ValueError(f"{self.folder} has no tensor {shown(name)}")
        return self._holders[name]

    def _holding(self, names: Sequence[str]) -> set[MappedFile]:
        return {self._holder(name) for name in names}


def _index(folder: Path) -> Path | None:
    """The path of the index; None if there is one file, model.safetensors."""
    needed = f"needed: a folder with {WEIGHTS}, or with {INDEX} and its shards"
    if not os.path.isdir(folder):
        found = "is not a folder" if os.path.lexists(folder) else "is missing"
        raise ValueError(f"{folder} {found}; {needed}; a model of the Hub is downloaded first")
    if os.path.lexists(folder / WEIGHTS):
        return None
    if not os.path.lexists(folder / INDEX):
        names = sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHTS)
        found = f", but {', '.join(names[:3])}" if names else ""
        raise ValueError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}{found}; {needed}. Pickles and GGUF are never read: take a "
            "revision with safetensors"
        )
    return folder / INDEX


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
