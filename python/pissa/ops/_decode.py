"""The numbers of codes in PyTorch's operations, bit for bit those of the kernels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pissa.ops._load import _C
from pissa.ops.formats import NESTED_BLOCKSIZE, READ, QuantFormat


@cache
def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


_DYNAMIC_MAP = tuple(_C.limits()["dynamic_map"])
_E8M0 = (*(2.0 ** (byte - 127) for byte in range(255)), math.nan)
_HALF_E8M0 = tuple(2.0 ** (byte - 128) for byte in range(256))


def _planes(values: Tensor, shifts: Iterable[int], mask: int) -> Tensor:
    """Bits of values [..., n] at each shift, one after the other: [..., shifts * n]."""
    return torch.cat([values >> shift & mask for shift in shifts], -1)


@cache
def _levels_of_bytes(format: QuantFormat, device: torch.device) -> Tensor:
    """The levels [256, codes] of the codes in each byte."""
    shifts = (4, 0) if format.name == "nf4" else range(0, 8, format.bits)
    levels = [format.levels[byte >> shift & (1 << format.bits) - 1] for byte in range(256) for shift in shifts]
    return _table(tuple(levels), device).view(256, -1)


def _levels(codes: Tensor, format: QuantFormat) -> Tensor:
    """The levels [n, elements] of codes [n, bytes]: those of a byte are found together."""
    if format.bits == 3:
        low, middle, high = codes.view(len(codes), codes.shape[1] // 3, 3).int().unbind(-1)
        bits = _planes((low | middle << 8 | high << 16)[..., None], range(0, 24, 3), 7)
        return _table(format.levels, codes.device)[bits].flatten(1)
    return functional.embedding(codes.int(), _levels_of_bytes(format, codes.device)).flatten(1)


_SMALL = {"q4_0": (2, 0, 0), "iq4_nl": (2, 0, 0), "q4_1": (4, 0, 2), "q5_0": (6, 2, 0), "q5_1": (8, 4, 2)}
"""Where the codes, fifth bits and minimum of a block of 32 elements begin (cpp/pissa/core/gguf.h)."""


def _gguf(block: Tensor, format: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [n, elements] of blocks [n, bytes], and the scales and minima [n, groups]."""

    def half(at: int) -> Tensor:
        return block[:, at : at + 2].contiguous().view(torch.float16).float()

    def pairs(at: int, parts: int, length: int) -> Tensor:
        return _planes(block[:, at : at + parts * length].view(-1, parts, length), (0, 4), 15).flatten(1)

    def quarters(at: int) -> Tensor:
        return _planes(block[:, at : at + 64].view(-1, 2, 32), (0, 2, 4, 6), 3).flatten(1)

    def six_bits(low: Tensor, high: Tensor) -> Tensor:
        return (low | high << 4).float() - 32

    if format == "mxfp4_gguf":
        return pairs(1, 1, 16), _table(_HALF_E8M0, block.device)[block[:, :1].int()], None
    if format == "q8_0":
        return block[:, 2:], half(0), None
    if format in _SMALL:
        at, fifth, minimum = _SMALL[format]
        codes = pairs(at, 1, 16)
        if fifth:
            codes = codes | _planes(block[:, fifth : fifth + 4, None], range(8), 1).flatten(1) << 4
        return codes, half(0), half(minimum) if minimum else None
    if format == "q2_k":
        return quarters(16), half(80) * (block[:, :16] & 15), -half(82) * (block[:, :16] >> 4)
    if format == "q3_k":
        scales = six_bits(_planes(block[:, 96:104], (0, 4), 15), _planes(block[:, 104:108], (0, 2, 4, 6), 3))
        return quarters(32) | _planes(block[:, :32], range(8), 1) << 2, half(108) * scales, None
    if format == "q6_k":
        return pairs(0, 2, 64) | quarters(128) << 4, half(208) * block[:, 192:208].view(torch.int8), None
    if format == "iq4_xs":
        low, high = pairs(4, 4, 1), _planes(block[:, 2:4, None], (0, 2, 4, 6), 3).flatten(1)
        return pairs(8, 8, 16), half(0) * six_bits(low, high), None
    low, middle, high = block[:, 4:8], block[:, 8:12], block[:, 12:16]
    scales = half(0) * torch.cat([low & 63, high & 15 | low >> 6 << 4], 1)
    minima = -half(2) * torch.cat([middle & 63, high >> 4 | middle >> 6 << 4], 1)
    if format == "q4_k":
        return pairs(16, 4, 32), scales, minima
    return pairs(48, 4, 32) | _planes(block[:, 16:48], range(8), 1) << 4, scales, minima


class Codes:
    """A weight [rows, cols] of codes. Rows whose blocks cross them are decoded together, as one long row."""

    def __init__(self, *held: Any) -> None:
        codes, absmax, nested_absmax, offset, name, self.blocksize, self.rows, self.cols = held
        self.format, blocksize, rows, cols = READ[name], *held[5:]
        in_rows = self.format.scales in ("tiles", "within")
        self.together = 1 if in_rows else blocksize // math.gcd(blocksize, cols)
        self.long_rows = -(-rows // self.together)
        (size,), _ = self.format.tensors((self.long_rows * self.together, cols), blocksize, False)["codes"]
        self.codes = _padded(codes, size).view(self.long_rows, -1)
        if self.format.is_read_only:
            return
        scales = absmax.float()
        if offset is not None:
            scales = _table(_DYNAMIC_MAP, absmax.device)[absmax.int()]
            scales = scales * nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: len(scales)] + offset
        elif absmax.dtype == torch.uint8:
            scales = (_table(_E8M0, absmax.device) if nested_absmax is None else nested_absmax)[absmax.int()]
        across = -(-self.together * cols // blocksize)
        self.scales = _padded(scales, -(-len(scales) // across) * across).view(-1, across)

    def decode_long(self, rows: Tensor) -> Tensor:
        """The long rows of these numbers, float32."""
        codes = self.codes[rows]
        if self.format.is_read_only:
            bits, scales, minima = _gguf(codes.view(-1, self.format.block_bytes), self.format.name)
            levels = _table(self.format.levels, codes.device)[bits.int()]
            values = torch.unflatten(levels, 1, (scales.shape[1], -1)) * scales[..., None]
            return (values if minima is None else values + minima[..., None]).view(len(rows), self.cols)
        values = _levels(codes, self.format)
        tall = self.blocksize if len(self.scales) < self.long_rows else 1
        scales = self.scales[rows // tall].repeat_interleave(self.blocksize, 1)[:, : values.shape[1]]
        # INT8's step is 1 / 127 in float32 (cpp/pissa/core/int8.h).
        return values * scales * 7.874015718698502e-3 if self.format.name == "int8" else values * scales

    def decode(self, first: int, last: int) -> Tensor:
        """Rows [first, last) in float32. The first is a multiple of `together`."""
        long = torch.arange(first // self.together, -(-last // self.together), device=self.codes.device)
        return self.decode_long(long).view(-1, self.cols)[: last - first]

    def look_up(self, indices: Tensor) -> Tensor:
        """Rows of these numbers in float32; one that is not there is the first."""
        rows = torch.where((indices >= 0) & (indices < self.rows), indices, 0).flatten()
        long = self.decode_long(rows // self.together).view(len(rows), self.together, self.cols)
        return long[torch.arange(len(rows), device=rows.device), rows % self.together].view(*indices.shape, self.cols)


def _padded(values: Tensor, count: int) -> Tensor:
    lacking = count - values.numel()
    return functional.pad(values.reshape(-1), (0, lacking)) if lacking else values
