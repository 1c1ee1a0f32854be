"""GGUF files: read as package gguf writes them, and refused with one error that names the file if they are damaged."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mapped_files import unmap_unused
from pissa.containers.gguf_file import BLOCKS, DTYPES, GgufFile, model_file, open_gguf, parts_of
from pissa.ops.formats import READ

METADATA: dict[str, Any] = {
    "a.text": "größer",
    "a.number": 7,
    "a.real": 0.5,
    "a.yes": True,
    "a.texts": ["", "ä", "token"],
    "a.numbers": [1, -2, 3],
    "a.reals": [0.5, -1.0],
}


def write(path: Path, metadata: dict[str, Any] = METADATA, tensors: dict[str, np.ndarray] | None = None) -> Path:
    """A file with metadata and tensors; those whose names begin with a type of gguf's are quantised so."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in metadata.items():
        kinds = {str: "string", bool: "bool", int: "int32", float: "float32", list: "array"}
        getattr(writer, f"add_{kinds[type(value)]}")(name, value)
    generator = np.random.default_rng(0)
    if tensors is None:
        tensors = {name: generator.standard_normal((3, 64), np.float32) for name in ("F32.w", "F16.w", "Q8_0.w")}
        tensors["F32.v"] = generator.standard_normal(5, np.float32)
        tensors["Q4_1.stack"] = generator.standard_normal((2, 3, 32), np.float32)
    for name, values in tensors.items():
        kind = gguf.GGMLQuantizationType[name.partition(".")[0]]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_value_and_every_byte_is_the_writers(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    file, theirs = GgufFile(path), gguf.GGUFReader(path)
    assert {key: file.metadata[key] for key in METADATA} == METADATA
    assert [tensor.name for tensor in theirs.tensors] == list(file.entries)
    for tensor in theirs.tensors:
        ours = file.view(tensor.name)
        assert tuple(ours.shape) == tensor.data.shape
        assert ours.reshape(-1).view(torch.uint8).numpy().tobytes() == tensor.data.tobytes()
    assert file.formats == {"Q8_0.w": READ["q8_0"], "Q4_1.stack": READ["q4_1"]}
    assert file.entries["Q4_1.stack"].shape == (2, 3, 20)
    assert GgufFile(path).identity == file.identity


def test_blocks_are_those_of_the_library() -> None:
    for kind, name in BLOCKS.items():
        sizes = (READ[name].usual_blocksize, READ[name].block_bytes)
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == sizes
        assert gguf.GGMLQuantizationType(kind).name.lower() == name.removesuffix("_gguf")
    for kind, dtype in DTYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == (1, dtype.itemsize)


def test_a_large_vocabulary_is_read(tmp_path: Path) -> None:
    tokens = [f"token{number}" for number in range(262_144)]
    file = GgufFile(write(tmp_path / "x.gguf", {"t": tokens, "s": [0.0] * len(tokens)}, {}))
    assert file.metadata["t"] == tokens
    assert len(file.metadata["s"]) == len(tokens)


def test_a_file_that_changes_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf")
    file = GgufFile(path)
    with path.open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(OSError, match=r"has changed since it was opened: .* writes to it \[P085\]"):
        file.view("F32.w")


# ---- Damage ----------------------------------------------------------------------------------------------------------


def read_all(path: Path) -> None:
    file = GgufFile(path)
    for name in file.entries:
        file.view(name).reshape(-1)[:1].tolist()


def check(path: Path, content: bytes) -> None:
    """The content is read, or refused with an error that names the file."""
    unmap_unused()
    path.write_bytes(content)
    said = f"{path} cannot be read: "
    try:
        read_all(path)
    except ValueError as error:
        said = str(error)
    assert said.startswith(f"{path} cannot be read: ")
    assert "\n" not in said


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    content = write(tmp_path / "x.gguf").read_bytes()
    last = max(entry.offset + entry.nbytes for entry in GgufFile(tmp_path / "x.gguf").entries.values())
    for length in range(last):
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path / 'cut.gguf'))} cannot be read: "):
            read_all(tmp_path / "cut.gguf")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_read_or_refused(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(write(tmp_path / "x.gguf").read_bytes())
    for place, value in changes:
        content[place] = value
    check(tmp_path / "changed.gguf", bytes(content))


HUGE = struct.pack("<Q", 2**62)


def of_vector(place: int, new: bytes) -> Callable[[bytes], bytes]:
    """Replaces bytes after the name of the vector: its number of dimensions, its length, its type, its offset."""
    fields = b"F32.v" + struct.pack("<IQIQ", 1, 5, 0, 1376)
    begin = len(b"F32.v") + place
    return lambda content: content.replace(fields, fields[:begin] + new + fields[begin + len(new) :])


@pytest.mark.parametrize(
    ("replace", "words"),
    [
        (lambda x: b"GGML" + x[4:], "begins with b'GGML'; needed: GGUF"),
        (lambda x: x[:4] + struct.pack("<I", 1) + x[8:], "its version is .*; needed: 2 or 3"),
        (lambda x: x[:4] + struct.pack(">I", 3) + x[8:], r"\(big-endian\)"),
        (lambda x: x[:8] + HUGE + x[16:], "bytes of the header are expected"),
        (lambda x: x[:16] + HUGE + x[24:], "bytes of the header are expected|of the type"),
        (lambda x: x[:24] + HUGE + x[32:], "4,611,686,018,427,387,904 bytes of the header are expected"),
        (lambda x: x.replace(b"a.number", b"a.text\0\0"), None),
        (lambda x: x.replace(b"a.texts", b"a.reals"), "'a.reals' is there twice"),
        (lambda x: x.replace(b"F16.w", b"F32.w"), "tensor 'F32.w' is there twice"),
        (of_vector(0, struct.pack("<I", 9)), "'F32.v' has 9 dimensions; allowed: 1 to 4"),
        (of_vector(4, HUGE), "'F32.v' is at .*; allowed: multiples of 32"),
        (of_vector(12, struct.pack("<I", 16)), "'F32.v' is of the type IQ2_XXS; read"),
        (of_vector(12, struct.pack("<I", 99)), "'F32.v' is of the type 99; read are"),
        (of_vector(12, struct.pack("<I", 8)), "rows of 5; needed: a multiple of 32"),
        (of_vector(16, struct.pack("<Q", 0)), "'F32.[vw]' is at"),
        (of_vector(16, struct.pack("<Q", 33)), "'F32.v' is at"),
    ],
)
def test_what_is_wrong_is_said(replace: Callable[[bytes], bytes], words: str | None, tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf")
    path.write_bytes(replace(path.read_bytes()))
    if words is None:
        read_all(path)
        return
    match = rf"^{re.escape(str(path))} cannot be read: .*({words}).*download or copy it again \[P085\]$"
    with pytest.raises(ValueError, match=match):
        read_all(path)


def test_what_has_no_place_in_a_header_is_refused(tmp_path: Path) -> None:
    def header(value: bytes) -> bytes:
        return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + value

    for value, words in {
        struct.pack("<I", 13): "a value of metadata is of the type 13",
        struct.pack("<IIQ", 9, 9, 1): "elements of the type 9",
        struct.pack("<IIQ", 9, 8, 2**60): "bytes of the header are expected",
        struct.pack("<IIQ", 9, 0, 2**60): "bytes of the header are expected",
        struct.pack("<IQ", 8, 1) + b"\xff": "can't decode byte",
    }.items():
        (tmp_path / "x.gguf").write_bytes(header(value))
        with pytest.raises(ValueError, match=words):
            GgufFile(tmp_path / "x.gguf")
    for alignment in ("text", 12, 0):
        with pytest.raises(ValueError, match=r"general\.alignment is .*; needed: a multiple of 8"):
            GgufFile(write(tmp_path / "y.gguf", {"general.alignment": alignment}, {}))
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(ValueError, match=r"begins with b''; needed: GGUF"):
        GgufFile(tmp_path / "empty.gguf")
    with pytest.raises(ValueError, match=r"missing\.gguf is missing"):
        GgufFile(tmp_path / "missing.gguf")


# ---- Several files ---------------------------------------------------------------------------------------------------


def split(folder: Path, count: int = 2, **changes: Any) -> list[Path]:
    paths = [folder / name for name in parts_of(f"m-00001-of-{count:05}.gguf")]
    for number, path in enumerate(paths):
        metadata = {"split.count": count, "split.no": number, "split.tensors.count": count} | changes
        write(path, metadata, {f"F32.{number}": np.ones((1, 32), np.float32)})
    return paths


def test_the_parts_of_a_model_are_found_from_each(tmp_path: Path) -> None:
    paths = split(tmp_path, 3)
    for path in paths:
        assert [file.path for file in open_gguf(path)] == paths
    assert model_file(tmp_path) == paths[0]
    paths[1].unlink()
    with pytest.raises(ValueError, match=r"m-00002-of-00003\.gguf is missing"):
        open_gguf(paths[0])


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    first, second = split(tmp_path)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"m-00002-of-00002\.gguf is part 0 .*its name says 1 of 2"):
        open_gguf(first)
    split(tmp_path, **{"split.tensors.count": 5})
    with pytest.raises(ValueError, match="its parts have 2 tensors of 5"):
        open_gguf(first)
    alone = tmp_path / "alone.gguf"
    first.rename(alone)
    with pytest.raises(ValueError, match=r"alone\.gguf is part 0 .* of 2, and its name says 0 of 1"):
        open_gguf(alone)


def test_which_file_of_a_folder_is_the_model(tmp_path: Path) -> None:
    assert model_file(tmp_path) is None
    write(tmp_path / "mmproj-F16.gguf")
    assert model_file(tmp_path) is None
    model = write(tmp_path / "a.GGUF")
    assert model_file(tmp_path) == model_file(model) == model
    write(tmp_path / "b.gguf")
    with pytest.raises(ValueError, match=r"contains 2 models; give the path of one of them: a\.GGUF, b\.gguf"):
        model_file(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert model_file(tmp_path) is None
