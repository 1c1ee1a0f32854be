"""The header of a safetensors file: where each tensor lies."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import safe_open

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


class Entry(NamedTuple):
    """Where a tensor lies, and what it is."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""
    nbytes: int


def read_entries(path: Path) -> dict[str, Entry]:
    """Reads the header, which safetensors checks: offsets, shapes and dtypes fit each other, and the file.

    Returns:
        the tensors in the order in which they lie in the file.

    Raises:
        OSError, ValueError, SafetensorError: it cannot be read, or describes another file than this one; the message
            does not name the file.
    """
    cast(Any, safe_open)(path, "numpy").__exit__(None, None, None)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop(METADATA, None)
    entries = {}
    for name, fields in header.items():
        if (dtype := DTYPES.get(fields["dtype"])) is None:
            raise ValueError(f"tensor {shown(name)} has the dtype {fields['dtype']!r}; known: {', '.join(DTYPES)}")
        begin, end = fields["data_offsets"]
        entries[name] = Entry(path, dtype, tuple(fields["shape"]), 8 + length + begin, end - begin)
    return dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)))


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
