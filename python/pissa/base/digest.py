"""Fingerprints of tensors, which identify their values and are the same on every machine.

A fingerprint is a text of three parts, with a fourth part for a single floating tensor::

    xxh3:bfloat16:68577c773a89b2cbef6d14097043ba91:3e000000...

The kind     "xxh3", XXH3-128 of the bytes: on a CPU as fast as memory. Or "sums", two exact sums: a GPU computes
             them of its own tensors, so that the host reads 48 bytes of each.
The dtype    of the first tensor. Floating tensors that are compared with the fingerprint are cast to it first: a
             bfloat16 checkpoint that is loaded in float32 is the one that was trained on in bfloat16. A stored residual
             is computed from the weight in that dtype, too.
The digest   of shapes and values, 32 hexadecimal digits.
The sample   eight elements as float32, 64 hexadecimal digits, to be compared with a tensor in a dtype that does not
             hold the values.
"""

from __future__ import annotations

import enum
import functools
import struct
from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

XXH3, SUMS = KINDS = ("xxh3", "sums")

_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Elements that are cast and hashed, or multiplied, at once. They fit into the CPU's cache; on a GPU their products
take 128 MB, which keeps the number of kernels small."""

_SAMPLE = 8
"""Elements in the sample. One element of two independent Gaussian weights agrees up to bfloat16's rounding in one of
400 cases, all eight in one of 10^20."""

_PACKED = struct.Struct(f"<{_SAMPLE}f")


class Match(enum.Enum):
    """The result of comparing a tensor with a fingerprint."""

    SAME = enum.auto()
    """The values are the same, in the dtype of the fingerprint."""
    ROUNDED = enum.auto()
    """The tensor's dtype does not hold the values; those of the sample are the same up to its rounding."""
    OTHER = enum.auto()


class Fingerprint:
    """A fingerprint, as text or as integers that are still on the GPU that computes them."""

    def __init__(self, found: str | Tensor, dtype: torch.dtype | None = None) -> None:
        self.found = found
        self.dtype = dtype_of(found) if isinstance(found, str) else dtype
        """The dtype of the first tensor."""

    def __str__(self) -> str:
        return read([self])[0]

    @property
    def kind(self) -> str:
        """The way its digest is computed."""
        return SUMS if isinstance(self.found, Tensor) else kind_of(self.found)


def fingerprint(*tensors: Tensor, kind: str | None = None, dtype: torch.dtype | None = None) -> Fingerprint:
    """The fingerprint of the shapes and values of `tensors`, on one device.

    Args:
        kind: the kind of fingerprint (default: the kind that this device computes fast).
        dtype: the dtype to which floating tensors are cast first (default: they stay as they are).
    """
    first = tensors[0]
    if kind is None:
        kind = SUMS if first.is_cuda else XXH3
    if dtype is None or not first.is_floating_point():
        dtype = first.dtype
    sample = _sample(first, dtype) if len(tensors) == 1 and dtype.is_floating_point else None
    if kind == SUMS:
        integers = [sums(*tensors, dtype=dtype)] + ([] if sample is None else [sample.view(torch.int64)])
        return Fingerprint(torch.cat(integers), dtype)
    texts = [xxh3(*tensors, dtype=dtype)] + ([] if sample is None else [_PACKED.pack(*sample.tolist()).hex()])
    return Fingerprint(_text(XXH3, dtype, texts))


def read(fingerprints: Sequence[Fingerprint]) -> list[str]:
    """The fingerprints as text. The host waits once for each device that still holds some."""
    waiting: dict[tuple[torch.device, int], list[tuple[Fingerprint, Tensor]]] = {}
    for one in fingerprints:
        if isinstance(one.found, Tensor):
            waiting.setdefault((one.found.device, len(one.found)), []).append((one, one.found))
    for pairs in waiting.values():
        for (one, _), values in zip(pairs, torch.stack([found for _, found in pairs]).tolist(), strict=True):
            assert one.dtype is not None
            sample = struct.pack(f"<{len(values) - 2}q", *values[2:]).hex()
            one.found = _text(SUMS, one.dtype, [as_text(values[:2]), *([sample] if sample else [])])
    return [str(one.found) for one in fingerprints]


def kind_of(recorded: str) -> str:
    """The kind of a fingerprint that was read."""
    return recorded.partition(":")[0]


def dtype_of(recorded: str) -> torch.dtype:
    """The dtype of the first tensor for which a fingerprint was computed."""
    found: torch.dtype = getattr(torch, recorded.split(":")[1])
    return found


def holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether every value of the dtype `other` is one of `dtype`."""
    return torch.promote_types(dtype, other) == dtype


def is_fingerprint(recorded: str | None, *tensors: Tensor) -> bool:
    """Whether `recorded`, of any kind, is the fingerprint of these tensors in its dtype."""
    return match(recorded, *tensors) is Match.SAME


def match(recorded: str | None, *tensors: Tensor) -> Match:
    """Compares tensors with a fingerprint of any kind, in its dtype."""
    if recorded is None:
        return Match.OTHER
    found = str(fingerprint(*tensors, kind=kind_of(recorded), dtype=dtype_of(recorded)))
    if found == recorded:
        return Match.SAME
    return Match.ROUNDED if _is_rounded(found, recorded, tensors[0].dtype) else Match.OTHER


def _is_rounded(found: str, recorded: str, dtype: torch.dtype) -> bool:
    """Whether `found`, the fingerprint of a weight in `dtype` that was cast to the dtype of `recorded`, differs from it
    only by roundings, as far as the samples show."""
    was = dtype_of(recorded)
    if not (dtype.is_floating_point and was.is_floating_point) or holds(dtype, was):
        return False
    samples = [text.split(":")[3:] for text in (found, recorded)]
    if not all(samples):
        return False
    here, there = (_PACKED.unpack(bytes.fromhex(sample)) for [sample] in samples)
    # w rounded to `dtype` and then to `was`, against w rounded to `was`: half an epsilon each, and half a subnormal.
    infos = torch.finfo(dtype), torch.finfo(was)
    relative, absolute = sum(info.eps for info in infos), sum(info.eps * info.smallest_normal for info in infos)
    return all(abs(a - b) <= relative * abs(b) + absolute for a, b in zip(here, there, strict=True))


def _sample(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 [8], from all parts of the tensor, as it is in `dtype`."""
    places = (2 * torch.arange(_SAMPLE, device=tensor.device) + 1) * tensor.numel() // (2 * _SAMPLE)
    return torch.take(tensor.detach(), places).to(dtype).float()


def _text(kind: str, dtype: torch.dtype, parts: Sequence[str]) -> str:
    return ":".join([kind, str(dtype).removeprefix("torch."), *parts])


# ---- XXH3 ------------------------------------------------------------------------------------------------------------


def xxh3(*tensors: Tensor, dtype: torch.dtype | None = None) -> str:
    """XXH3-128 of the shapes and bytes of `tensors`. Floating tensors are cast to a floating `dtype`."""
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        to = cast_to(values, dtype)
        digest.update(f"{to} {tuple(values.shape)};".encode())
        for chunk in [values] if to == values.dtype else torch.split(values.view(-1), _CHUNK["cpu"]):
            digest.update(bytes_of(chunk.to(to)))
    return digest.hexdigest()


def xxh3_of_text(text: str) -> str:
    """The XXH3-128 of a text."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.view(-1).view(torch.uint8).numpy().data


# ---- Sums ------------------------------------------------------------------------------------------------------------
# Exact integer sums, which depend neither on an order nor on the host. Element x in row i and column j of a matrix adds
# x * column[j] * row[i], modulo 2^64, to each of two sums, which have different keys. For a floating element, x is its
# float32 bits as a signed integer, so that only the value counts and not the dtype; an integer is used as it is. Keys
# are odd and pseudo-random (SplitMix64): changing one element always changes a sum, and changing many leaves it the
# same only by chance. The sums guard against mistakes, not attacks.

_WIDTH = 4096
"""Columns for a tensor that is not a matrix: it is read in rows of this many elements, with a shorter last one."""

_COLUMNS, _ROWS = (0x636F6C31, 0x636F6C32), (0x726F7731, 0x726F7732)  # the seeds of the keys of the two sums


def sums(*tensors: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The two sums of the shapes and values of `tensors`, int64 [2] on their device. The host does not wait.

    Args:
        tensors: float32, bfloat16, float16 or integers, on one device. Their rows count as if stacked.
        dtype: a floating dtype to which floating tensors are cast first.
    """
    shapes = (f"{'floats' if tensor.is_floating_point() else 'integers'} {tuple(tensor.shape)}" for tensor in tensors)
    head = xxhash.xxh3_128_digest(";".join(shapes).encode())
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
    """The dtype to which a tensor is cast if `dtype` is requested: its own, if either is not floating."""
    if dtype is None or not (dtype.is_floating_point and tensor.is_floating_point()):
        return tensor.dtype
    return dtype


def as_text(values: list[int]) -> str:
    """The two sums, once read, as 32 hexadecimal digits."""
    return "".join(f"{value % 2**64:016x}" for value in values)


def _matrices(tensor: Tensor) -> list[Tensor]:
    if tensor.dim() == 2:
        return [tensor]
    flat = tensor.reshape(-1)
    whole = len(flat) // _WIDTH * _WIDTH
    return [part for part in (flat[:whole].view(-1, _WIDTH), flat[whole:].view(1, -1)) if part.numel()]


def _of_matrix(matrix: Tensor, first: int, dtype: torch.dtype) -> Tensor:
    """The sums of a matrix in `dtype`, where `first` is the number of its first row."""
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


@functools.lru_cache(maxsize=32)  # the layers of a model share a few sizes
def _keys(seeds: tuple[int, int], count: int, device: torch.device) -> Tensor:
    """The keys 0 to `count` - 1 of the two sums, int64 [2, count], by SplitMix64."""
    number = torch.arange(1, count + 1, device=device) * _signed(0x9E3779B97F4A7C15)
    mixed = torch.stack([number + seed for seed in seeds])
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    return (mixed ^ _shifted(mixed, 31)) | 1


def _shifted(values: Tensor, count: int) -> Tensor:
    """Shifts to the right, as for unsigned integers."""
    return (values >> count) & ((1 << (64 - count)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
