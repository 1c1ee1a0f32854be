"""A checkpoint's folder is read as it is, without copies, or refused in one line that names the file and the tensor."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from damage import joined, split
from pissa.containers.tensor_file import INDEX, WEIGHTS, Source

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MB = 1 << 20


def values(seed: int = 0) -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return {
        "layers.0.weight": torch.randn(6, 5, generator=dice).bfloat16(),
        "layers.0.bias": torch.randn(3, generator=dice),
        "layers.1.weight": torch.randn(4, 4, generator=dice).half(),
        "steps": torch.tensor(7),
        "empty": torch.empty(0, 4),
    }


def save(folder: Path, tensors: dict[str, Tensor], shards: bool = True) -> Path:
    """A checkpoint with these tensors: in two shards with an index, or in one file."""
    folder.mkdir(exist_ok=True)
    if not shards:
        save_file(tensors, folder / WEIGHTS)
        return folder
    names = list(tensors)
    files = {name: ONE if name in names[: len(names) // 2] else TWO for name in names}
    for file in (ONE, TWO):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return folder


def assert_holds(folder: Path, expected: dict[str, Tensor]) -> None:
    source = Source(folder)
    assert sorted(source.names) == sorted(expected)
    for name, tensor in expected.items():
        found, entry = source.read(name), source.entry(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape) == (entry.dtype, entry.shape)
        assert entry.nbytes == tensor.nbytes
        assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("shards", [False, True])
def test_reads_what_was_saved(shards: bool, tmp_path: Path) -> None:
    folder = save(tmp_path, values(), shards)
    assert_holds(folder, values())
    source = Source(folder)
    assert [path.name for path in source.paths] == ([ONE, TWO] if shards else [WEIGHTS])
    assert source.index == (folder / INDEX if shards else None)
    entries = [(source.path_of(name), source.entry(name)) for name in source.names]
    assert entries == sorted(entries, key=lambda found: (found[0], found[1].offset, found[1].nbytes))
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))} has no tensor 'nope'"):
        source.read("nope")


def test_one_file_is_read_rather_than_an_index(tmp_path: Path) -> None:
    """As transformers does."""
    save(tmp_path, values(1))
    assert_holds(save(tmp_path, values(0), shards=False), values(0))


@pytest.mark.system_calls("symlink")
def test_links_are_followed_as_the_hub_s_cache_has_them(tmp_path: Path) -> None:
    blobs, snapshot = save(tmp_path / "blobs", values()), tmp_path / "snapshot"
    snapshot.mkdir()
    for number, name in enumerate((ONE, TWO, INDEX)):
        (blobs / name).rename(blobs / f"{number:064x}")
        (snapshot / name).symlink_to(f"../blobs/{number:064x}")
    assert_holds(snapshot, values())
    (blobs / f"{1:064x}").unlink()
    with pytest.raises(ValueError, match=rf"{TWO} is a link to \.\./blobs/0+1, which is missing"):
        Source(snapshot)


def test_a_tensor_is_a_view_of_the_file_that_cannot_write_to_it(tmp_path: Path) -> None:
    path = save(tmp_path, values(), shards=False) / WEIGHTS
    before = path.read_bytes()
    source = Source(tmp_path)
    first, again = source.read("layers.0.weight"), source.read("layers.0.weight")
    assert first.data_ptr() == again.data_ptr()
    first.zero_()
    assert path.read_bytes() == before
    del source
    assert torch.equal(again, torch.zeros(6, 5))  # the mapping is there as long as a tensor of it


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_unaligned_tensors_are_copied(length: int, tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [length], "data_offsets": [0, length]},
        "b": {"dtype": "F32", "shape": [2, 2], "data_offsets": [length, length + 16]},
    }
    expected = {"a": torch.arange(length, dtype=torch.uint8), "b": torch.randn(2, 2)}
    (tmp_path / WEIGHTS).write_bytes(joined(header, b"".join(tensor.numpy().tobytes() for tensor in expected.values())))
    assert_holds(tmp_path, expected)
    source = Source(tmp_path)
    one, other = source.read("b"), source.read("b")
    assert one.data_ptr() % 4 == 0
    assert (one.data_ptr() == other.data_ptr()) == (source.entry("b").offset % 4 == 0)


# ---- Memory ----------------------------------------------------------------------------------------------------------


def mapped_bytes() -> int:
    """The pages of files that this process has in memory."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssFile"].split()[0]) * 1024


@pytest.mark.system_calls("MADV_DONTNEED")
def test_released_pages_leave_the_memory(tmp_path: Path) -> None:
    names = [f"layers.{number}" for number in range(16)]
    save(tmp_path, {name: torch.randn(512, 1024) for name in names}, shards=False)  # 16 of 2 MB
    source = Source(tmp_path)
    source.ahead(names)
    before = mapped_bytes()
    sums = [float(source.read(name).sum()) for name in names]
    used = mapped_bytes() - before
    assert used > 30 * MB
    source.release(names[:8])
    assert mapped_bytes() - before < used - 15 * MB
    kept = mapped_bytes()
    source.release(names)
    assert mapped_bytes() - before < 2 * MB
    assert kept - before > 14 * MB, "what was not named stays"
    assert [float(source.read(name).sum()) for name in names] == sums


@pytest.mark.system_calls("MADV_DONTNEED")
def test_pages_of_a_neighbour_stay(tmp_path: Path) -> None:
    """Rounded inwards: writing shows which pages have been given back, for then the file's own come again."""
    names = ["a", "b", "c"]
    tensors = {name: torch.ones(3000) for name in names}  # of 12,000 bytes: not of whole pages
    save(tmp_path, tensors, shards=False)
    source = Source(tmp_path)
    for name in names:
        source.read(name).zero_()
    source.release(["b"])
    assert not source.read("a").any()
    assert not source.read("c").any()
    assert 0 < int(source.read("b").sum()) < 3000
    source.release(["c", "a", "b"])
    assert source.read("b").all()  # also the pages that they share
    assert source.read("c").all()


# ---- Refused ---------------------------------------------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[dict[str, Any]], object], data: bytes | None = None) -> None:
    header, old = split(path.read_bytes())
    change(header)
    path.write_bytes(joined(header, old if data is None else data))


def indexed(**files: str) -> Callable[[Path], None]:
    """The index names these files for these tensors; if there are none, it names no tensor."""

    def act(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = index["weight_map"] | files if files else {}
        (folder / INDEX).write_text(json.dumps(index))

    return act


def bias(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: rewritten(folder / ONE, lambda header: header["layers.0.bias"].update(fields))


def only(*names: str) -> Callable[[Path], None]:
    """The folder with these files only, which are empty."""

    def act(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        for name in names:
            (folder / name).touch()

    return act


def gone(folder: Path) -> None:
    only()(folder)
    folder.rmdir()


def pipe(folder: Path) -> None:
    (folder / TWO).unlink()
    os.mkfifo(folder / TWO)


def lacking(folder: Path) -> None:
    rewritten(folder / TWO, lambda header: header.pop("empty"))


def longer(folder: Path) -> None:
    rewritten(folder / ONE, lambda _: None, bytes(1000))


def in_two(folder: Path) -> None:
    save_file(values(), folder / TWO)


def truncated(folder: Path) -> None:
    content = (folder / TWO).read_bytes()
    (folder / TWO).write_bytes(content[:-5])


def unreadable(folder: Path) -> None:
    (folder / TWO).unlink()
    (folder / TWO).symlink_to("/proc/self/mem")


NEEDED = (f"needed: a folder with {WEIGHTS}, or with {INDEX}",)
AGAIN = ("download or copy",)
# Malformed JSON, headers and offsets are the corpora's: containers/test_damaged.py.
REFUSED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no folder": (gone, ("missing", *NEEDED)),
    "empty folder": (only(), ("neither", *NEEDED)),
    "pickle": (
        only("pytorch_model.bin"),
        ("but pytorch_model.bin;", "GGUF file. Pickles are never read", *NEEDED),
    ),
    "GGUF": (only("model.gguf"), ("but model.gguf;", "GGUF file. Pickles are never read", *NEEDED)),
    "no index": (lambda folder: (folder / INDEX).unlink(), (f"but {ONE}, {TWO};", INDEX, *NEEDED)),
    "no shard": (lambda folder: (folder / TWO).unlink(), (TWO, "missing", *AGAIN)),
    "pipe": (pipe, (TWO, "not a regular file", *AGAIN)),
    "unreadable": (unreadable, (TWO, "cannot be read", *AGAIN)),
    "truncated": (truncated, (TWO, "cannot be read", "incomplete", *AGAIN)),
    "larger shape": (bias(shape=[4]), (ONE, "cannot be read", *AGAIN)),
    "unknown dtype": (bias(dtype="F4", shape=[24]), (ONE, "'layers.0.bias' has the dtype 'F4'; known: U64", *AGAIN)),
    "bytes left over": (longer, (ONE, *AGAIN)),
    "tensor missing": (lacking, (TWO, "'empty' is missing", INDEX, *AGAIN)),
    "tensor in two": (in_two, (ONE, TWO, "'layers.0.bias' is in", *AGAIN)),
    "index of nothing": (indexed(), (INDEX, "names no tensor", *AGAIN)),
    "index leaves": (indexed(steps=f"../{TWO}"), (INDEX, f"'steps' is in '../{TWO}'", *AGAIN)),
    "index of a pickle": (indexed(steps="a.bin"), (INDEX, "'steps' is in 'a.bin'", *AGAIN)),
}


SYSTEM_CALLS = {"pipe": "mkfifo", "unreadable": "symlink"}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.system_calls(*filter(None, [SYSTEM_CALLS.get(k)]))) for k in REFUSED]
)
def test_refused(kind: str, tmp_path: Path) -> None:
    damage, words = REFUSED[kind]
    folder = save(tmp_path / "model", values())
    damage(folder)
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        Source(folder)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message


# ---- Changed later ---------------------------------------------------------------------------------------------------


def shortened(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def touched(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 100))  # NTFS's unit


def replaced(path: Path) -> None:
    """By one of the same size and time."""
    found = path.stat()
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    os.replace(other, path)


UNLINKED = pytest.mark.system_calls("unlinked")
CHANGES = [touched, *(pytest.param(change, marks=UNLINKED) for change in (shortened, replaced, Path.unlink))]


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_is_not_read_further(change: Callable[[Path], None], mapped: bool, tmp_path: Path) -> None:
    source = Source(save(tmp_path, values()))
    if mapped:
        source.read("layers.0.bias")
    change(tmp_path / ONE)
    with pytest.raises((OSError, ValueError), match=f"{ONE} (has changed since|cannot be read: No such)") as caught:
        source.read("layers.0.bias")
    assert "\n" not in str(caught.value)
    source.ahead(source.names)
    assert int(source.read("steps")) == 7


def test_the_identity_says_which_file_is_another(tmp_path: Path) -> None:
    first = Source(save(tmp_path, values())).identity()
    assert first == Source(tmp_path).identity()
    assert [*first] == [ONE, TWO]
    touched(tmp_path / TWO)
    second = Source(tmp_path).identity()
    assert (first[ONE], first[TWO]) != (second[ONE], second[TWO])
    assert first[ONE] == second[ONE]
    times = (tmp_path / ONE).stat()
    rewritten(tmp_path / ONE, lambda header: header["layers.0.bias"].update(shape=[3, 1]))
    rewritten(tmp_path / ONE, lambda header: header.update(__metadata__={}), None)
    os.utime(tmp_path / ONE, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert Source(tmp_path).identity()[ONE] != first[ONE]
