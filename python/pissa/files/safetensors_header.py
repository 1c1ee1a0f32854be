"""The header of a safetensors file: where each tensor lies. What is read here is not believed before it is checked."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open

from pissa.files.json_file import parse_json, typed, typed_fields
from pissa.files.messages import shown

DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""torch's dtype for each of the format's whose elements are whole bytes, in the order in which safetensors writes
them."""

METADATA = "__metadata__"
"""The entry of a header that is no tensor."""

LIMIT = 100_000_000
"""The longest header that safetensors reads, in bytes."""

_FIELDS = {"dtype": str, "shape": list[int], "data_offsets": list[int]}


class Entry(NamedTuple):
    """Where a tensor lies, and what it is."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""
    nbytes: int


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Reads the header of the file, and no more than the file has.

    Returns:
        the header as an object, and the offset of the first byte behind it.

    Raises:
        OSError, ValueError: it cannot be read; the message does not name the file.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LIMIT):
            raise ValueError(f"it has {size} bytes, and its first 8 announce a header of {length}")
        header = parse_json(file.read(length))
    return typed(header, dict[str, Any], "the header"), 8 + length


def read_entries(path: Path) -> dict[str, Entry]:
    """Reads the header and checks all of it.

    Returns:
        the tensors in the order in which they lie in the file.

    Raises:
        OSError, ValueError: it cannot be read, or describes another file than this one; the message does not name the
            file.
    """
    header, start = read_header(path)
    header.pop(METADATA, None)
    size = path.stat().st_size
    entries = [(name, _entry(path, name, fields, start, size)) for name, fields in header.items()]
    try:  # that they neither overlap nor leave a hole
        cast(Any, safe_open)(path, "numpy").__exit__(None, None, None)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    return dict(sorted(entries, key=lambda item: (item[1].offset, item[1].nbytes)))


def _entry(path: Path, name: str, fields: Any, start: int, size: int) -> Entry:
    where = f"tensor {shown(name)}"
    try:
        found = typed_fields(fields, _FIELDS, "its entry")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    dtype, shape, offsets = found["dtype"], found["shape"], found["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"{where} has the dtype {shown(dtype)}; known: {', '.join(DTYPES)}")
    begin, end = offsets if len(offsets) == 2 else (0, -1)
    nbytes = _nbytes(DTYPES[dtype], shape)
    if nbytes is None or not 0 <= begin <= end < _TOO_MANY or end - begin != nbytes:
        raise ValueError(f"{where}, {dtype} {shown(shape)}, cannot be at the offsets {shown(offsets)}")
    if start + end > size:
        raise ValueError(f"{where} ends at byte {start + end}, and the file has {size}: it is truncated")
    return Entry(path, DTYPES[dtype], tuple(shape), start + begin, nbytes)


_DIMENSIONS = 64
"""Those of a tensor of torch, at most."""

_TOO_MANY = 1 << 63
"""Bytes, or elements between two of a tensor, that torch cannot count."""


def _nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int | None:
    """The bytes of a tensor; None if torch can have none of that shape. It counts no further than that: the product of
    any sides that a header may have takes hours."""
    if len(shape) > _DIMENSIONS:
        return None
    span = dtype.itemsize
    for side in shape:
        span *= max(side, 1)  # a side of 0 as well: torch has strides beside it
        if side < 0 or span >= _TOO_MANY:
            return None
    return 0 if 0 in shape else span


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Layout:
    """Where the tensors of a file will lie: dtypes of large elements first, so that each tensor is aligned to its
    elements without holes, which the format forbids; those of one size in the given order.

    Args:
        tensors: by name, the dtype and the shape.
        metadata: of the file; transformers wants {"format": "pt"}.

    Raises:
        ValueError: a dtype that the format does not have, or a name that it reserves.
    """

    def __init__(
        self, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
    ) -> None:
        header: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
        places: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = {}
        end = 0
        for name in sorted(tensors, key=lambda name: -tensors[name][0].itemsize):
            dtype, shape = tensors[name][0], tuple(tensors[name][1])
            if dtype not in _NAMES or name == METADATA:
                raise ValueError(f"tensor {shown(name)}, {dtype}, has no place in a safetensors file")
            begin, end = end, end + dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
            places[name] = (dtype, shape, begin, end - begin)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        self.header = len(text).to_bytes(8, "little") + text
        """The first bytes of the file."""
        self.size = len(self.header) + end
        """Bytes of the file."""
        self._places = places

    @property
    def names(self) -> list[str]:
        """The tensors, in the order in which they lie in the file."""
        return list(self._places)

    def entry(self, path: Path, name: str) -> Entry:
        """Where the tensor is in the file at `path`.

        Raises:
            ValueError: no such tensor.
        """
        if name not in self._places:
            raise ValueError(f"{path}: no tensor {shown(name)} is planned")
        dtype, shape, begin, nbytes = self._places[name]
        return Entry(path, dtype, shape, len(self.header) + begin, nbytes)
