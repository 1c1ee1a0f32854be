"""The header of a GGUF file: metadata and tensors."""

from __future__ import annotations

from pathlib import Path

from pissa.containers.gguf_file import GgufFile

FILE = "model.gguf"


def parse(folder: Path) -> None:
    file = GgufFile(folder / FILE)
    assert file.identity
    for name, entry in file.entries.items():
        assert tuple(file.view(name).shape) == entry.shape
