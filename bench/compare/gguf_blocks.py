"""Weights in random blocks of GGUF files."""

from __future__ import annotations

import numpy
import torch

from pissa import ops
from pissa.ops.formats import READ

_HALVES = {"q4_1": (0, 2), "q5_1": (0, 2), "q4_k": (0, 2), "q5_k": (0, 2), "q2_k": (80, 82), "q3_k": (108,)}
_HALVES |= {"q6_k": (208,), "mxfp4_gguf": ()}
"""Where blocks have numbers of 16 bits; others have one in their first two bytes."""


def random_blocks(format: str, rows: int, columns: int, seed: int = 0) -> numpy.ndarray:
    """uint8 [rows, bytes]: random codes, with scales of ordinary size."""
    generator = numpy.random.default_rng(seed)
    size, elements = READ[format].block_bytes, READ[format].usual_blocksize
    blocks = generator.integers(0, 256, (rows, columns // elements, size), dtype=numpy.uint8)
    for at in _HALVES.get(format, (0,)):
        scales = generator.uniform(0.5, 1.5, (*blocks.shape[:2], 1)) / 256
        blocks[..., at : at + 2] = scales.astype(numpy.float16).view(numpy.uint8)
    if format == "mxfp4_gguf":
        blocks[..., 0] = generator.integers(118, 124, blocks.shape[:2])
    return blocks.reshape(rows, -1)


def weight_of(blocks: numpy.ndarray, format: str) -> ops.QuantizedWeight:
    """The weight whose rows are these bytes."""
    rows, size = blocks.shape
    elements = READ[format].usual_blocksize
    shape = (rows, size // READ[format].block_bytes * elements)
    codes = torch.from_numpy(blocks.copy()).view(-1)
    return ops.QuantizedWeight(codes, torch.empty(0, dtype=torch.uint8), None, None, format, shape, elements)
