"""The header of a checkpoint's file, and of an adapter's: by our own reader and by safetensors'."""

from __future__ import annotations

from pathlib import Path

from pissa.containers.tensor_file import Source, TensorFile

FILE, HEADER = "model.safetensors", 8


def parse(folder: Path) -> None:
    source = Source(folder)
    file = TensorFile(folder / FILE)
    assert sorted(file.entries) == sorted(source.names)
    for name in source.names:
        tensor = source.read(name)
        assert (tensor.dtype, tuple(tensor.shape)) == file.entries[name][:2]
        file.read(name)
    file.expect_checksums()
