"""Fingerprints of tensors, which tell them from others, the same on every machine.

A fingerprint is a text of three parts, and of a fourth if it is that of one floating tensor::

    xxh3:bfloat16:68577c773a89b2cbef6d14097043ba91:3e000000...

The kind     "xxh3", XXH3-128 of the bytes: on a CPU as fast as memory. Or "sums", the two sums of `base.sums`: a GPU
             computes them of its own tensors, so that the host reads 48 bytes of each.
The dtype    of the first tensor. Floating tensors that are compared with the fingerprint are cast to it first: a
             bfloat16 checkpoint that is loaded in float32 is the one that was trained on in bfloat16. A stored residual
             is computed from the weight in that dtype, too.
The digest   of shapes and values, 32 hexadecimal digits.
The sample   eight elements as float32, 64 hexadecimal digits: what can be compared with a tensor in a dtype that does
             not hold the values.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

from pissa.base.sums import as_text, cast_to, sums

XXH3, SUMS = KINDS = ("xxh3", "sums")

_CHUNK = 1 << 16
"""Elements that are cast at once: they stay in the cache until they are hashed."""

_SAMPLE = 8
"""Elements of the sample. One element of two independent Gaussian weights agrees up to bfloat16's rounding once in 400
times, all eight once in 10^20."""

_PACKED = struct.Struct(f"<{_SAMPLE}f")


class Match(enum.Enum):
    """What a comparison of a tensor with a fingerprint shows."""

    SAME = enum.auto()
    """The values are the same, in the dtype of the fingerprint."""
    ROUNDED = enum.auto()
    """The tensor's dtype does not hold the values; those of the sample are the same up to its rounding."""
    OTHER = enum.auto()


class Fingerprint:
    """A fingerprint as text, or as the integers that the GPU still has which computes them."""

    def __init__(self, found: str | Tensor, dtype: torch.dtype | None = None) -> None:
        self.found = found
        self.dtype = dtype_of(found) if isinstance(found, str) else dtype
        """That of the first tensor."""

    def __str__(self) -> str:
        return read([self])[0]

    @property
    def kind(self) -> str:
        """How its digest is computed."""
        return SUMS if isinstance(self.found, Tensor) else kind_of(self.found)


def fingerprint(*tensors: Tensor, kind: str | None = None, dtype: torch.dtype | None = None) -> Fingerprint:
    """The fingerprint of the shapes and values of `tensors`, on one device.

    Args:
        kind: by default the one that this device is quick with.
        dtype: what floating tensors are cast to first; by default they stay as they are.
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
    """The fingerprints as text. The host waits once for each device that still has some."""
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
    """The dtype of the first tensor that a fingerprint was computed of."""
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
    by roundings alone, as far as the samples show."""
    was = dtype_of(recorded)
    if not (dtype.is_floating_point and was.is_floating_point) or holds(dtype, was):
        return False
    samples = [text.split(":")[3:] for text in (found, recorded)]
    if not all(samples):
        return False
    here, there = (_PACKED.unpack(bytes.fromhex(sample)) for [sample] in samples)
    # w, rounded to `dtype` and then to `was`, beside w rounded to `was`: half an epsilon each, and half a subnormal.
    infos = torch.finfo(dtype), torch.finfo(was)
    relative, absolute = sum(info.eps for info in infos), sum(info.eps * info.smallest_normal for info in infos)
    return all(abs(a - b) <= relative * abs(b) + absolute for a, b in zip(here, there, strict=True))


def xxh3(*tensors: Tensor, dtype: torch.dtype | None = None) -> str:
    """XXH3-128 of the shapes and bytes of `tensors`; floating ones are cast to `dtype`, if that is one."""
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        to = cast_to(values, dtype)
        digest.update(f"{to} {tuple(values.shape)};".encode())
        for chunk in [values] if to == values.dtype else torch.split(values.view(-1), _CHUNK):
            digest.update(bytes_of(chunk.to(to)))
    return digest.hexdigest()


def xxh3_of_text(text: str) -> str:
    """XXH3-128 of a text."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _sample(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 [8], from all parts of the tensor, as it is in `dtype`."""
    places = (2 * torch.arange(_SAMPLE, device=tensor.device) + 1) * tensor.numel() // (2 * _SAMPLE)
    return torch.take(tensor.detach(), places).to(dtype).float()


def _text(kind: str, dtype: torch.dtype, parts: Sequence[str]) -> str:
    return ":".join([kind, str(dtype).removeprefix("torch."), *parts])
