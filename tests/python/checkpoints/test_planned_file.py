"""A file whose header comes first: safetensors reads it, whoever wrote which part when."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pissa.checkpoints import planned_file
from pissa.checkpoints.planned_file import Layout, PlannedFile, create, is_finished
from pissa.files.source import Source
from pissa.files.tensor_file import DTYPES, MappedFile


def values() -> dict[str, Tensor]:
    """An odd number of elements of each dtype, smallest elements first; and shapes of all kinds."""
    dice = torch.Generator().manual_seed(0)
    codes = {
        str(dtype): torch.randint(0, 2, (5, 3 * dtype.itemsize), generator=dice).byte().view(dtype)
        for dtype in sorted(DTYPES.values(), key=lambda dtype: dtype.itemsize)
    }
    return codes | {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "ünicode 'name'": torch.ones(2),
        "transposed": torch.randn(7, 6, generator=dice).T,
        "cube": torch.randn(4, 3, 5, generator=dice).bfloat16(),
    }


def plan(tensors: dict[str, Tensor]) -> Layout:
    return Layout({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, {"format": "pt"})


def same(found: Tensor, expected: Tensor) -> bool:
    """Bit for bit, for every dtype."""
    alike = (found.dtype, found.shape) == (expected.dtype, expected.shape)
    return alike and found.contiguous().reshape(-1).view(torch.uint8).equal(
        expected.contiguous().reshape(-1).view(torch.uint8)
    )


@pytest.fixture(params=[planned_file._CHUNK, 8])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with chunks of 8 bytes: then everything is written and copied in parts."""
    monkeypatch.setattr(planned_file, "_CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
def test_written_in_any_order_it_is_the_file_that_was_planned(tmp_path: Path) -> None:
    tensors, path = values(), tmp_path / "model.safetensors"
    layout = plan(tensors)
    create({path: layout})
    assert path.stat().st_size == layout.size
    assert path.stat().st_blocks * 512 >= layout.size, "on the disk before anything is written"
    file = PlannedFile(path, layout)
    names = list(tensors)
    random.Random(0).shuffle(names)
    for name in names:
        file.write(name, tensors[name])
    file.flush()
    file.close()
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert {name: opened.get_slice(name).get_shape() for name in [*layout.entries]} == {
            name: list(tensors[name].shape) for name in [*layout.entries]
        }
    with Source.open(tmp_path) as source:
        assert set(source.names) == tensors.keys()
        assert all(same(source.read(name), tensor) for name, tensor in tensors.items())
    assert all(same(tensor, tensors[name]) for name, tensor in load_file(path).items())


def test_every_tensor_is_aligned_and_the_order_is_the_given_one(tmp_path: Path) -> None:
    layout = plan(values())
    entries = layout.entries.values()
    assert all(entry.offset % entry.dtype.itemsize == 0 for entry in entries)
    assert [*values()] != [*layout.entries]
    assert [*layout.entries] == sorted(values(), key=lambda name: -values()[name].dtype.itemsize)
    assert len(layout.header) % 8 == 0
    assert plan(values()).header == layout.header
    assert plan(dict(reversed(values().items()))).header != layout.header
    create({tmp_path / "x": layout})
    assert MappedFile(tmp_path / "x").entries == layout.entries


@pytest.mark.usefixtures("chunk")
def test_rows_are_written_by_themselves(tmp_path: Path) -> None:
    tensors, path = values(), tmp_path / "x"
    create({path: plan(tensors)})
    file = PlannedFile(path, plan(tensors))
    for first, count in ((3, 1), (0, 1), (1, 1)):
        file.write("cube", tensors["cube"][first : first + count], first)
    file.write("transposed", tensors["transposed"][4:], first=4)
    file.close()
    found = load_file(path)
    assert same(found["cube"][[0, 1, 3]], tensors["cube"][[0, 1, 3]])
    assert not found["cube"][2].any()
    assert same(found["transposed"][4:], tensors["transposed"][4:])
    assert not found["transposed"][:4].any()


@pytest.mark.parametrize(
    ("name", "tensor", "first"),
    [
        ("cube", torch.zeros(4, 3, 5), None),
        ("cube", torch.zeros(4, 3, 6).bfloat16(), None),
        ("cube", torch.zeros(4, 15).bfloat16(), None),
        ("cube", torch.zeros(3, 3, 5).bfloat16(), None),
        ("cube", torch.zeros(2, 3, 5).bfloat16(), 3),
        ("cube", torch.zeros(2, 3, 5).bfloat16(), -1),
        ("cube", torch.zeros(5, 3, 5).bfloat16(), 0),
        ("cube", torch.zeros(3, 5).bfloat16(), 1),
        ("scalar", torch.zeros(()), 0),
        ("scalar", torch.zeros(1), None),
        ("nope", torch.zeros(1), None),
    ],
)
def test_another_tensor_than_planned_is_refused(name: str, tensor: Tensor, first: int | None, tmp_path: Path) -> None:
    path = tmp_path / "x"
    create({path: plan(values())})
    before = path.read_bytes()
    file = PlannedFile(path, plan(values()))
    with pytest.raises(ValueError, match=f"{path}: .*tensor '{name}'"):
        file.write(name, tensor, first)
    file.close()
    assert path.read_bytes() == before


def test_a_dtype_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tensor 'x', torch\.complex128, has no place"):
        Layout({"x": (torch.complex128, (1,))})


def test_created_again_it_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, layout = tmp_path / "x", plan(values())
    create({path: layout})
    file = PlannedFile(path, layout)
    file.write("cube", values()["cube"])
    file.close()
    before = path.read_bytes()
    os.truncate(path, layout.size - 20)  # killed while it was made
    create({path: layout})
    assert path.read_bytes() == before
    assert is_finished(path, layout)
    monkeypatch.delattr(os, "posix_fallocate")  # which takes long where the file system cannot do it
    create({path: layout})
    assert path.read_bytes() == before
    assert not is_finished(path, plan({"x": torch.ones(1)}))
    assert not is_finished(tmp_path / "y", layout)


# ---- A full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_the_message_of_a_full_disk(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    files = {tmp_path / name: Layout({"x": (torch.uint8, (3_000_000_000,))}) for name in ("a", "b")}
    monkeypatch.setattr(os, "posix_fallocate", fail)
    message = (
        rf"{tmp_path}/a cannot be written \({os.strerror(number)}\): 6 GB are needed, and [\d.]+ GB free there: make"
    )
    with pytest.raises(OSError, match=message) as caught:
        create(files)
    assert "\n" not in str(caught.value)


def test_a_disk_that_fails_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    create({tmp_path / "x": plan(values())})
    file = PlannedFile(tmp_path / "x", plan(values()))
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError, match=f"{tmp_path}/x cannot be written: Input/output error"):
        file.write("cube", values()["cube"])
    file.close()
