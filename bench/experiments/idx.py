"""The IDX format, in which MNIST is published: a header with the sizes, then bytes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of unsigned bytes, with so many dimensions, that a file holds.

    Raises:
        SystemExit: there is no such file, or it is not of that form, or has another length than its header says.
    """
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; MNIST's four files are needed there, unpacked")
    content = path.read_bytes()
    header = 4 * (1 + dimensions)
    wanted = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    if content[:4] != wanted or len(content) < header:
        raise SystemExit(
            f"{path}: begins with {content[:4].hex()}, an IDX file of bytes with {dimensions} dimensions with "
            f"{wanted.hex()} and {dimensions} sizes; a compressed file has to be unpacked"
        )
    sizes = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
    if len(content) - header != math.prod(sizes):
        raise SystemExit(
            f"{path}: {len(content) - header} bytes after the header, which says {' x '.join(map(str, sizes))}: it was "
            "cut or changed; fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(sizes)
