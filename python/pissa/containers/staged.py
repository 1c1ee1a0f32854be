"""Writes into a folder: a crash leaves either the old or the new files, and no other file is overwritten."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pissa.system import flush_folder


class CompletedError(Exception):
    """An earlier run has already written everything. Nothing has been changed."""


def check_unused(folder: Path, instead: str = "", besides: str = "") -> None:
    """Refuses a folder that contains anything other than `besides`, because it could be overwritten. The message puts
    `instead`, another way to continue, before "choose a new one"."""
    if os.path.lexists(folder) and not folder.is_dir():
        what = "leads nowhere" if folder.is_symlink() and not folder.exists() else "is a file"
        raise ValueError(f"{folder} {what}; needed: a new folder [P065]")
    if folder.is_dir() and (names := sorted({path.name for path in folder.iterdir()} - {besides})):
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ValueError(f"{folder} is not empty ({some}) and nothing is overwritten; {instead}choose a new one [P065]")


def check_new(file: Path) -> None:
    """Refuses a file that exists."""
    if os.path.lexists(file):
        raise ValueError(f"{file} exists already and nothing is overwritten; choose a new file [P065]")


@contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Callable[[str], Path]]:
    """Writes files under temporary names, and renames them if the block ends without an error.

        with staged(folder) as path:
            write_text(path("a.json"), ...)

    All files are on the disk before the first is renamed. They are renamed in the order in which `path` named them.
    After an error, no new file is left, and no folder that was created here.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[Path, Path] = {}

    def temporary(name: str) -> Path:
        path = folder / f".{name}.{os.getpid()}.tmp"
        files[path] = folder / name
        return path

    try:
        yield temporary
        put_in_place(files)
    except BaseException:
        for path in files:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # another program has put something there
            for path in made:
                path.rmdir()
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8 whose lines end in "\\n" on every system: the same text is the same bytes. What of a name
    Python could not decode, in a locale of ASCII, is written as it was."""
    path.write_bytes(text.encode("utf-8", "surrogateescape"))


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
