"""What a path is, by the names of files and their first bytes. Nothing is imported that takes time."""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"

UNFINISHED = ".unfinished"
"""The hidden folder in which a run of `checkpoints.output` writes until it has finished."""

FINISHED = ".finished.json"
"""The identity of the run that wrote a folder, in that folder: a second such run reports that nothing is left to do."""


def is_gguf(path: Path) -> bool:
    """Whether the path has the name of a GGUF file, or is one: those of Ollama are named by their digest."""
    if path.suffix.lower() == ".gguf":
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def has_model(folder: Path) -> bool:
    """Whether it is the folder of a model."""
    return (folder / CONFIG).is_file()


def has_adapter(folder: Path) -> bool:
    """Whether the folder contains an adapter that `open_adapter` reads."""
    return (folder / ADAPTER_CONFIG).is_file()


def check_adapter(folder: Path) -> None:
    """Raises ValueError for anything but an adapter's folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is {'a file' if folder.exists() else 'missing'}; needed: an adapter folder [P071]")
    if not has_adapter(folder):
        raise ValueError(f"{folder} holds no adapter: there is no {ADAPTER_CONFIG} [P071]")


def has_output(folder: Path) -> bool:
    """Whether a run of `checkpoints.output` has written in the folder, so that the same run may go on."""
    return (folder / UNFINISHED).is_dir() or (folder / FINISHED).is_file()
