"""The header of a safetensors file: where each tensor lies. Nothing here reads a value, or believes a size."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open

from pissa.files.json_file import parse_json, typed, typed_fields
from pissa.files.messages import shown

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""torch's dtype for each of the format's whose elements are whole bytes."""

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
        OSError, ValueError, RecursionError: it cannot be read; the message does not name the file.
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
        OSError, ValueError, RecursionError: it cannot be read, or describes another file than this one; the message
            does not name the file.
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
    nbytes = DTYPES[dtype].itemsize * math.prod(shape)
    if min((begin, *shape), default=0) < 0 or end - begin != nbytes:
        raise ValueError(f"{where}, {dtype} {shown(shape)}, cannot be at the offsets {shown(offsets)}")
    if start + end > size:
        raise ValueError(f"{where} ends at byte {start + end}, and the file has {size}: it is truncated")
    return Entry(path, DTYPES[dtype], tuple(shape), start + begin, nbytes)
