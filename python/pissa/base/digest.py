"""Fingerprints of tensors, which identify their values and are the same on every machine.

A fingerprint is a text of three parts, with a fourth part for a single floating tensor::

    xxh3:bfloat16:68577c773a89b2cbef6d14097043ba91:3e000000...

The hash     that computes the digest: "xxh3", XXH3-128, as fast as memory.
The dtype    of the first tensor. Floating tensors that are compared with the fingerprint are cast to it first: a
             bfloat16 checkpoint that is loaded in float32 is the one that was trained on in bfloat16. A stored residual
             is computed from the weight in that dtype, too.
The digest   of shapes and bytes, 32 hexadecimal digits.
The sample   eight elements as float32, 64 hexadecimal digits, to be compared with a tensor in a dtype that does not
             hold the values.
"""

from __future__ import annotations

import enum
import struct

import torch
import xxhash
from torch import Tensor

_CAST, _FETCHED = 1 << 16, 1 << 24
"""Elements that are cast at once, which fit into the CPU's cache, and that are brought to it at once, 64 MB at most."""

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


def fingerprint(*tensors: Tensor, dtype: torch.dtype | None = None) -> str:
    """The fingerprint of the shapes and values of `tensors`, on one device. Floating tensors are cast to `dtype` first,
    if one is given."""
    first = tensors[0]
    if dtype is None or not first.is_floating_point():
        dtype = first.dtype
    parts = ["xxh3", str(dtype).removeprefix("torch."), xxh3(*tensors, dtype=dtype)]
    if len(tensors) == 1 and dtype.is_floating_point:
        parts.append(_PACKED.pack(*_sample(first, dtype).tolist()).hex())
    return ":".join(parts)


def dtype_of(recorded: str) -> torch.dtype:
    """The dtype of the first tensor for which a fingerprint was computed."""
    dtype: torch.dtype = getattr(torch, recorded.split(":")[1])
    return dtype


def holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether every value of the dtype `other` is one of `dtype`."""
    return torch.promote_types(dtype, other) == dtype


def is_fingerprint(recorded: str | None, *tensors: Tensor) -> bool:
    """Whether `recorded` is the fingerprint of these tensors in its dtype."""
    return match(recorded, *tensors) is Match.SAME


def match(recorded: str | None, *tensors: Tensor) -> Match:
    """Compares tensors with a fingerprint, in its dtype."""
    if recorded is None:
        return Match.OTHER
    actual = fingerprint(*tensors, dtype=dtype_of(recorded))
    if actual == recorded:
        return Match.SAME
    return Match.ROUNDED if _is_rounded(actual, recorded, tensors[0].dtype) else Match.OTHER


def _is_rounded(actual: str, recorded: str, dtype: torch.dtype) -> bool:
    """Whether `actual`, the fingerprint of a weight in `dtype` that was cast to the dtype of `recorded`, differs from
    it only by roundings, as far as the samples show."""
    was = dtype_of(recorded)
    if not (dtype.is_floating_point and was.is_floating_point) or holds(dtype, was):
        return False
    samples = [text.split(":")[3:] for text in (actual, recorded)]
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


def xxh3(*tensors: Tensor, dtype: torch.dtype | None = None) -> str:
    """XXH3-128 of the shapes and bytes of `tensors`. Floating tensors are cast to a floating `dtype`. A tensor on a GPU
    is brought to the CPU in pieces."""
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        to, values = _cast_to(tensor, dtype), tensor.detach().contiguous().view(-1)
        digest.update(f"{to} {tuple(tensor.shape)};".encode())
        on_cpu = values.device.type == "cpu"
        is_in_place = on_cpu and to == values.dtype
        for piece in [values] if is_in_place else torch.split(values, _CAST if on_cpu else _FETCHED):
            digest.update(bytes_of(piece.to(to).cpu()))
    return digest.hexdigest()


def xxh3_of_text(text: str) -> str:
    """The XXH3-128 of a text."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def seed_of(layer: str) -> int:
    """The seed of what is random about the layer of that name, from 0 to 2**63 - 1."""
    return int(xxh3_of_text(layer)[:16], 16) >> 1


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _cast_to(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype to which a tensor is cast if `dtype` is requested: its own, if either is not floating."""
    if dtype is None or not (dtype.is_floating_point and tensor.is_floating_point()):
        return tensor.dtype
    return dtype
