"""Files of tensors: the bytes that are written, and tensors that wait on the disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pissa.base.digest import xxh3
from pissa.files.safetensors_header import DTYPES
from pissa.files.scratch import Scratch
from pissa.files.tensor_file import SAVED_FLOATS, TensorFile, write_tensors


def tensors_of_all_dtypes() -> dict[str, Tensor]:
    """Of odd sizes, in an order that is neither that of the file nor that of their names."""
    bits = torch.randint(0, 2, (3 * 8,), dtype=torch.uint8)
    found = {f"{i % 3}{name} ü": bits.view(dtype).clone() for i, (name, dtype) in enumerate(DTYPES.items())}
    return found | {"point": torch.tensor(1.5), "empty": torch.empty(0, 3), "z": torch.ones(5), "a": torch.ones(1, 3)}


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
    (tmp_path / "file").write_bytes(content)
    file = TensorFile(tmp_path / "file")
    for name in file.names[:-1]:
        file.read(name)
    with pytest.raises(ValueError, match=f"'{file.names[-1]}' is damaged: its checksum"):
        file.read(file.names[-1])


def test_a_tensor_is_taken_when_it_is_written(tmp_path: Path) -> None:
    taken: list[str] = []

    class Lazy(Mapping[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            taken.append(name)
            return torch.full((4,), float(name))

        def __iter__(self) -> Iterator[str]:
            return iter("201")

        def __len__(self) -> int:
            return 3

    write_tensors(tmp_path / "file", Lazy())
    assert taken == [*"012", *"012"]
    assert load_file(tmp_path / "file")["2"].tolist() == [2.0] * 4


def test_scratch_gives_back_what_was_put_and_leaves_nothing(tmp_path: Path) -> None:
    tensors = tensors_of_all_dtypes()
    with Scratch(tmp_path) as scratch:
        for name, tensor in tensors.items():
            scratch.put(name, tensor)
        assert list(scratch) == list(tensors)
        for name, tensor in reversed(tensors.items()):
            found = scratch[name]
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert found.view(-1).view(torch.uint8).tolist() == tensor.view(-1).view(torch.uint8).tolist()
        assert not list(tmp_path.iterdir())
        with pytest.raises(KeyError):
            scratch["other"]
