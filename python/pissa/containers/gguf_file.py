"""A GGUF file: its metadata read, its header checked, its tensors mapped. Package gguf's own reader loops on hostile
counts, and takes seconds for a vocabulary of 262,144 tokens."""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pissa.base.digest import xxh3
from pissa.containers.messages import quote
from pissa.containers.recognise import is_gguf
from pissa.containers.tensor_file import Entry, MappedFile
from pissa.ops.formats import READ, QuantFormat

DTYPES = {
    0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64,
    24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64,
}  # fmt: skip
"""torch's dtype for each type of GGML's whose elements are numbers."""


BLOCKS = {
    2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 10: "q2_k", 11: "q3_k", 12: "q4_k", 13: "q5_k", 14: "q6_k",
    20: "iq4_nl", 23: "iq4_xs", 39: "mxfp4_gguf",
}  # fmt: skip
"""The format for each type whose elements are codes, in blocks that are runs of elements of a row."""

_NOT_READ = {
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 29: "IQ1_M", 40: "NVFP4",
}  # fmt: skip

# The types of metadata that are numbers, as struct names them. 8 is a text, 9 an array.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


class GgufFile(MappedFile):
    """A mapped GGUF file of version 2 or 3, little-endian. The entry of a tensor in codes is uint8 [..., out, bytes of
    a row]."""

    remedy = (
        "Files of GGUF's versions 2 and 3 are read. If this is one, it is damaged or incomplete: download or copy it "
        "again [P085]"
    )

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with self._header_errors():
            reader = _Reader(self._map)
            tensors, values = reader.numbers("QQ")
            self.metadata: dict[str, Any] = {}
            """The file's keys and values; arrays are lists."""
            self._pairs: dict[str, bytes] = {}
            for _ in range(values):
                begin = reader.position
                key = reader.text()
                if key in self.metadata:
                    raise ValueError(f"{quote(key)} is there twice")
                self.metadata[key] = reader.value(*reader.numbers("I"))
                self._pairs[key] = self._map[begin : reader.position]
            self._descriptions = reader.position
            self.formats: dict[str, QuantFormat] = {}
            """The formats of tensors in codes, by name."""
            self.entries = self._tensors(reader, tensors)

    def _check(self) -> None:
        with open(self.path, "rb") as file:
            begin = file.read(8)
        magic, version = begin[:4], begin[4:]
        if magic != b"GGUF":
            raise ValueError(f"it begins with {quote(magic)}; needed: GGUF")
        if version not in (b"\2\0\0\0", b"\3\0\0\0"):
            order = " (big-endian)" if version[:2] == b"\0\0" else ""
            raise ValueError(f"its version is {quote(version)}{order}; needed: 2 or 3")

    @property
    def digest(self) -> str:
        """The XXH3-128 of the header."""
        return xxh3(torch.frombuffer(self._map, dtype=torch.uint8, count=self._header))

    def header(self, texts: Mapping[str, str]) -> bytes:
        """The bytes before those of the tensors, with these texts in the metadata too, or instead."""
        pairs = dict(self._pairs)
        for key, text in texts.items():
            name, value = key.encode(), text.encode()
            pairs[key] = struct.pack(f"<Q{len(name)}sIQ", len(name), name, _TEXT, len(value)) + value
        tensors = self._map[self._descriptions : self._header]
        content = self._map[:16] + struct.pack("<Q", len(pairs)) + b"".join(pairs.values()) + tensors
        return content.ljust(-(-len(content) // self._alignment) * self._alignment, b"\0")

    @property
    def start(self) -> int:
        """The position of the first tensor's bytes."""
        return -(-self._header // self._alignment) * self._alignment

    def _tensors(self, reader: _Reader, count: int) -> dict[str, Entry]:
        """The tensors, after checking that they lie in the file one after the other."""
        entries = {}
        for _ in range(count):
            name = reader.text()
            if name in entries:
                raise ValueError(f"tensor {quote(name)} is there twice")
            (dimensions,) = reader.numbers("I")
            if not 1 <= dimensions <= 4:
                raise ValueError(f"tensor {quote(name)} has {dimensions} dimensions; allowed: 1 to 4")
            shape = reader.numbers("Q" * dimensions)[::-1]
            entries[name] = self._entry(name, shape, *reader.numbers("IQ"))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            raise ValueError(f"general.alignment is {quote(alignment)}; needed: a multiple of 8")
        self._header, self._alignment = reader.position, alignment
        end = start = self.start
        ordered = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
        for name, entry in ordered.items():
            begin = start + entry.offset
            if begin % alignment or begin < end or begin + entry.nbytes > len(self._map):
                place = f"{begin:,} to {begin + entry.nbytes:,}"
                allowed = f"multiples of {alignment}, from {end:,} to the end at {len(self._map):,}"
                raise ValueError(f"tensor {quote(name)} is at {place}; allowed: {allowed}")
            ordered[name] = entry._replace(offset=begin)
            end = begin + entry.nbytes
        return ordered

    def _entry(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Entry:
        if kind in DTYPES:
            return Entry(DTYPES[kind], shape, offset, math.prod(shape) * DTYPES[kind].itemsize)
        if kind not in BLOCKS:
            said = f"is of the type {_NOT_READ.get(kind, kind)}; read are numbers and {', '.join(BLOCKS.values())}"
            raise ValueError(f"tensor {quote(name)} {said}: take another file of the model, such as its Q4_K_M")
        format = self.formats[name] = READ[BLOCKS[kind]]
        if shape[-1] % format.usual_blocksize:
            needed = f"a multiple of {format.usual_blocksize}, a block of {format.name}"
            raise ValueError(f"tensor {quote(name)} has rows of {shape[-1]}; needed: {needed}")
        stored = (*shape[:-1], shape[-1] // format.usual_blocksize * format.block_bytes)
        return Entry(torch.uint8, stored, offset, math.prod(stored))


class _Reader:
    """Reads a header from its beginning to its end. Every count is bounded by the bytes that are left."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self.position = 8  # after magic and version

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        """The next numbers, of the types that struct gives these letters."""
        begin = self.position
        self._advance(struct.calcsize(f"<{kinds}"))
        return struct.unpack_from(f"<{kinds}", self._content, begin)

    def text(self) -> str:
        """The next text."""
        (length,) = self.numbers("Q")
        begin = self.position
        self._advance(length)
        return self._content[begin : self.position].decode()

    def value(self, kind: int) -> Any:
        """The next value, of that type of metadata: a number, a text, or a list of them."""
        if kind == _TEXT:
            return self.text()
        if kind in _NUMBERS:
            return self.numbers(_NUMBERS[kind])[0]
        if kind != _ARRAY:
            raise ValueError(f"a value of metadata is of the type {kind}; known: 0 to 12")
        of, count = self.numbers("IQ")
        if of == _TEXT:
            self._expect(8 * count)
            return [self.text() for _ in range(count)]
        if of not in _NUMBERS:
            raise ValueError(f"an array of metadata has elements of the type {of}; known: numbers and texts")
        self._expect(count)  # before struct, which refuses more than it can count
        return list(self.numbers(f"{count}{_NUMBERS[of]}"))

    def _advance(self, count: int) -> None:
        self._expect(count)
        self.position += count

    def _expect(self, count: int) -> None:
        if (left := len(self._content) - self.position) < count:
            raise ValueError(f"{count:,} bytes of the header are expected at {self.position:,}, and {left:,} are left")


# ---- A model, in one file or several ---------------------------------------------------------------------------------

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)


def model_file(path: Path) -> Path | None:
    """The GGUF file that a path is, or the only model in one that a folder without safetensors contains: the first, if
    it is split. None if there is none.

    Raises:
        ValueError: the folder contains several models. The message lists them.
    """
    if not path.is_dir():
        return path if is_gguf(path) else None
    if any(path.glob("*.safetensors")):
        return None
    found = [file for file in sorted(path.iterdir()) if is_gguf(file) and not is_projector(file.name)]
    models = [file for file in found if file.name == parts_of(file.name)[0]]
    if len(models) > 1:
        names = ", ".join(file.name for file in models)
        raise ValueError(f"{path} contains {len(models)} models; give the path of one of them: {names}")
    return models[0] if models else None


def is_projector(name: str) -> bool:
    """Whether a file's name is that of an encoder of images, which lies beside a model."""
    return "mmproj" in name.lower()


def parts_of(name: str) -> list[str]:
    """The names of all files of the model of which the named one is a part."""
    if (part := _PART.fullmatch(name)) is None:
        return [name]
    return [f"{part[1]}-{number:05}-of-{part[3]}{part[4]}" for number in range(1, int(part[3]) + 1)]


def open_gguf(path: Path) -> list[GgufFile]:
    """The files of a model, of which one is given: the first has its metadata.

    Raises:
        ValueError: a file is missing or damaged, or they do not belong together. The message names it.
    """
    names = parts_of(path.name)
    files = [GgufFile(path.with_name(name)) for name in names]
    for number, file in enumerate(files):
        count, index = (file.metadata.get(f"split.{key}", default) for key, default in {"count": 1, "no": 0}.items())
        if (count or 1, index) != (len(files), number):
            raise ValueError(
                f"{file.path} is part {quote(index)} (from 0 on) of {quote(count)}, and its name says {number} of "
                f"{len(files)}: give it the name that it had, beside the others"
            )
    expected = files[0].metadata.get("split.tensors.count")
    if len(files) > 1 and expected is not None and expected != (found := sum(len(file.entries) for file in files)):
        raise ValueError(f"{path}: its parts have {found} tensors of {quote(expected)}: they do not belong together")
    return files
