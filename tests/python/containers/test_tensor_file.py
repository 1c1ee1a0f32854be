"""Files of tensors: where tensors lie, the bytes that are written, and tensors that wait on the disk."""

from __future__ import annotations

import errno
import json
import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_writer import layout_of, tensors_of_all_dtypes
from pissa.base.digest import xxh3
from pissa.containers.tensor_file import SAVED_FLOATS, Layout, Scratch, TensorFile, write_tensors


def test_every_tensor_is_aligned_and_the_order_is_the_given_one(tmp_path: Path) -> None:
    tensors = tensors_of_all_dtypes()
    layout = layout_of(tensors)
    assert all(entry.offset % entry.dtype.itemsize == 0 for entry in layout.entries.values())
    assert [*tensors] != [*layout.entries] == sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    assert len(layout.header) % 8 == 0
    assert layout_of(tensors).header == layout.header != layout_of(dict(reversed(tensors.items()))).header
    (tmp_path / "x").write_bytes(layout.header.ljust(layout.size, b"\0"))
    assert TensorFile(tmp_path / "x").entries == layout.entries


def test_a_dtype_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tensor 'x', torch\.complex128, has no place"):
        Layout({"x": (torch.complex128, (1,))})


def test_the_bytes_are_safetensors_own(tmp_path: Path) -> None:
    """But for the order of the two entries of the metadata, which safetensors leaves to chance."""
    tensors = tensors_of_all_dtypes()
    checksums = " ".join(xxh3(tensors[name]) for name in sorted(tensors))
    save_file(tensors, tmp_path / "theirs", {"format": "pt", "xxh3": checksums})
    write_tensors(tmp_path / "ours", tensors)
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("ours", "theirs"))
    size = int.from_bytes(theirs[:8], "little")
    assert (ours[:8], ours[8 + size :]) == (theirs[:8], theirs[8 + size :])
    assert list(json.loads(ours[8 : 8 + size]).items())[1:] == list(json.loads(theirs[8 : 8 + size]).items())[1:]


def test_every_tensor_has_its_checksum(tmp_path: Path) -> None:
    tensors = {name: torch.arange(3).to(dtype) for name, dtype in zip("cadb", SAVED_FLOATS, strict=True)}
    write_tensors(tmp_path / "file", tensors)
    file = TensorFile(tmp_path / "file")
    file.expect_checksums()
    assert all(torch.equal(file.read(name), tensors[name]) for name in tensors)
    content = bytearray((tmp_path / "file").read_bytes())
    content[-1] ^= 1
    (tmp_path / "damaged").write_bytes(content)
    file = TensorFile(tmp_path / "damaged")
    *whole, last = file.entries
    for name in whole:
        file.read(name)
    with pytest.raises(ValueError, match=f"'{last}' is damaged: its checksum"):
        file.read(last)


def test_a_file_that_the_system_does_not_map_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int, **__: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    write_tensors(tmp_path / "file", {"x": torch.ones(2)})
    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(OSError, match=r"Cannot allocate memory: .*, \d+ bytes, cannot be mapped.*overcommit.*file'$"):
        TensorFile(tmp_path / "file")


@pytest.mark.system_calls("unlinked")
def test_scratch_gives_back_what_was_put_and_leaves_nothing(tmp_path: Path) -> None:
    tensors = tensors_of_all_dtypes()
    with Scratch(tmp_path) as scratch:
        for name, tensor in tensors.items():
            scratch.put({name: tensor})
        assert list(scratch) == list(tensors)
        for name, tensor in reversed(tensors.items()):
            found = scratch[name]
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert found.view(-1).view(torch.uint8).tolist() == tensor.view(-1).view(torch.uint8).tolist()
        assert not list(tmp_path.iterdir())
        with pytest.raises(KeyError):
            scratch["other"]
