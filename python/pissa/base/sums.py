"""The fingerprint that a GPU computes where the tensor is: exact integer sums, which need no order and no host.

Element x of row i and column j of a matrix adds x * column[j] * row[i], modulo 2^64, to each of two sums, which have
keys of their own. x is the float32 bits of a floating element as a signed integer, so that values count, not the dtype
that holds them, or the integer that it is. Keys are odd and pseudo-random (SplitMix64): no change of one element leaves
a sum as it was, and a change of many does so by chance only. They guard against mistakes, not attacks.
"""

from __future__ import annotations

import functools

import torch
import xxhash
from torch import Tensor

_WIDTH = 4096
"""Columns of what is no matrix: it is taken in rows of so many elements, and a shorter last one."""

_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Elements that are multiplied at once: their products, 8 bytes each, stay in the CPU's cache; on a GPU 128 MB keep
the number of kernels small."""

_COLUMNS, _ROWS = (0x636F6C31, 0x636F6C32), (0x726F7731, 0x726F7732)  # the seeds of the keys of the two sums


def sums(*tensors: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The two sums of the shapes and values of `tensors`, int64 [2] on their device. The host does not wait.

    Args:
        tensors: float32, bfloat16, float16 or integers, on one device. The rows of all count as one below the other.
        dtype: a floating dtype that floating tensors are cast to first.
    """
    head = xxhash.xxh3_128(";".join(map(_described, tensors)).encode()).digest()
    device = tensors[0].device
    total = torch.stack(
        [torch.full((), int.from_bytes(part, "big", signed=True), device=device) for part in (head[:8], head[8:])]
    )
    first = 0
    for tensor in tensors:
        for matrix in _matrices(tensor.detach()):
            total += _of_matrix(matrix, first, cast_to(matrix, dtype))
            first += len(matrix)
    return total


def cast_to(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that a tensor is cast to if `dtype` is asked for: its own, if one of them is not floating."""
    if dtype is None or not (dtype.is_floating_point and tensor.is_floating_point()):
        return tensor.dtype
    return dtype


def as_text(values: list[int]) -> str:
    """The two sums, once read, as 32 hexadecimal digits."""
    return "".join(f"{value % 2**64:016x}" for value in values)


def _described(tensor: Tensor) -> str:
    return f"{'floats' if tensor.is_floating_point() else 'integers'} {tuple(tensor.shape)}"


def _matrices(tensor: Tensor) -> list[Tensor]:
    """The tensor as matrices, whose rows follow each other."""
    if tensor.dim() == 2:
        return [tensor]
    flat = tensor.reshape(-1)
    whole = len(flat) // _WIDTH * _WIDTH
    return [part for part in (flat[:whole].view(-1, _WIDTH), flat[whole:].view(1, -1)) if part.numel()]


def _of_matrix(matrix: Tensor, first: int, dtype: torch.dtype) -> Tensor:
    """The sums of a matrix in `dtype`, whose first row has that number."""
    rows, cols = matrix.shape
    columns, row = _keys(_COLUMNS, cols, matrix.device), _keys(_ROWS, first + rows, matrix.device)
    total = torch.zeros(2, dtype=torch.int64, device=matrix.device)
    step = max(1, _CHUNK[matrix.device.type] // cols)
    for start in range(0, rows, step):
        part = matrix[start : start + step]
        bits = part.to(dtype).float().view(torch.int32) if part.is_floating_point() else part
        of_rows = torch.stack([(bits * key).sum(1) for key in columns])
        total += (of_rows * row[:, first + start : first + start + len(part)]).sum(1)
    return total


@functools.lru_cache(maxsize=32)  # of all layers of a model, which share a few sizes
def _keys(seeds: tuple[int, int], count: int, device: torch.device) -> Tensor:
    """The keys 0 to `count` - 1 of the two sums, int64 [2, count], by SplitMix64."""
    number = torch.arange(1, count + 1, device=device) * _signed(0x9E3779B97F4A7C15)
    mixed = torch.stack([number + seed for seed in seeds])
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    return (mixed ^ _shifted(mixed, 31)) | 1


def _shifted(values: Tensor, count: int) -> Tensor:
    """To the right, as without a sign."""
    return (values >> count) & ((1 << (64 - count)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
