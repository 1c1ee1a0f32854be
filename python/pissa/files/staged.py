"""Writing into a folder: a crash leaves either the old files or the new ones, and no file of others is overwritten."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType


class CompletedError(Exception):
    """An earlier run has written all that this one was to write. Nothing has been changed."""


def check_unused(folder: Path, instead: str = "", besides: str = "") -> None:
    """Refuses a folder in which something could be overwritten.

    Args:
        instead: another way to go on, put before "choose a new folder" in the message.
        besides: a name that may be there.

    Raises:
        ValueError: `folder` is a file, or is not empty.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; needed: a new folder")
    if folder.is_dir() and (names := sorted({path.name for path in folder.iterdir()} - {besides})):
        listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ValueError(f"{folder} is not empty ({listed}) and nothing is overwritten; {instead}choose a new folder")


class Staged:
    """Files that are written under temporary names, and renamed if the block ends without an error.

        with Staged(folder) as staged:
            staged.path("a.json").write_text(...)

    All files are on the disk before the first is renamed. They are renamed in the order in which `path` named them.
    After an error no new file is left, and no folder that was made here.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._names: list[str] = []
        self._made: list[Path] = []

    def path(self, name: str) -> Path:
        """The temporary path, in the same folder, of the file that will be called `name`."""
        self._names.append(name)
        return self._temporary(name)

    def _temporary(self, name: str) -> Path:
        return self._folder / f".{name}.{os.getpid()}.tmp"

    def __enter__(self) -> Staged:
        self._made = [folder for folder in (self._folder, *self._folder.parents) if not folder.exists()]
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                put_in_place({self._temporary(name): self._folder / name for name in self._names})
        finally:
            for name in self._names:
                self._temporary(name).unlink(missing_ok=True)
            if error is not None:
                with suppress(OSError):  # somebody else has put something there
                    for folder in self._made:
                        folder.rmdir()


def put_in_place(files: Mapping[Path, Path]) -> None:
    """Renames complete files, from temporary paths to final ones on the same disk, in that order. All are on the disk
    before the first is renamed."""
    for temporary in files:
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
    for temporary, final in files.items():
        os.replace(temporary, final)
    for folder in {final.parent for final in files.values()}:
        flush_folder(folder)


def flush_folder(folder: Path) -> None:
    """Makes names that are new in the folder durable, if the system can open a folder."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
