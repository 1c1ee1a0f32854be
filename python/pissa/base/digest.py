"""Fingerprints of tensors, which tell them from others, the same on every machine.

There are three kinds, and each can be computed of a tensor on any device:

"xxh3:"  XXH3-128 of the bytes: on a CPU as fast as memory.
"sums:"  the two sums of `base.sums`: what a GPU computes of its own tensors, so that the host reads 16 bytes of each.
""       SHA-256 of the bytes, as in a pissa.json of format 1.

Behind the prefix are 32 hexadecimal digits, or 64 of SHA-256. A floating tensor counts by its values, not by the dtype
that holds them: a bfloat16 checkpoint loaded in float32 has the fingerprint of the same checkpoint loaded in bfloat16.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor

from pissa.base.sums import as_text, sums

XXH3, SUMS, SHA256 = KINDS = ("xxh3:", "sums:", "")

_CHUNK = 1 << 16
"""Elements that are narrowed at once: they stay in the cache from the first reading to the last."""


class Fingerprint:
    """A fingerprint as text, or as the sums that the GPU still has which computes them."""

    def __init__(self, found: str | Tensor) -> None:
        self.found = found

    def __str__(self) -> str:
        return read([self])[0]

    @property
    def kind(self) -> str:
        """Its prefix."""
        return SUMS if isinstance(self.found, Tensor) else kind_of(self.found)


def fingerprint(*tensors: Tensor, kind: str | None = None) -> Fingerprint:
    """The fingerprint of the shapes and values of `tensors`, on one device: of that kind, or of the one that this
    device is quick with."""
    if kind is None:
        kind = SUMS if tensors[0].is_cuda else XXH3
    if kind == SUMS:
        return Fingerprint(sums(*tensors))
    return Fingerprint(sha256(*tensors) if kind == SHA256 else xxh3(*tensors))


def read(fingerprints: Sequence[Fingerprint]) -> list[str]:
    """The fingerprints as text. The host waits once for each device that still has some."""
    waiting: dict[torch.device, list[tuple[Fingerprint, Tensor]]] = {}
    for one in fingerprints:
        if isinstance(one.found, Tensor):
            waiting.setdefault(one.found.device, []).append((one, one.found))
    for pairs in waiting.values():
        for (one, _), values in zip(pairs, torch.stack([found for _, found in pairs]).tolist(), strict=True):
            one.found = SUMS + as_text(values)
    return [str(one.found) for one in fingerprints]


def kind_of(recorded: str) -> str:
    """The kind of a fingerprint that was read."""
    return next(kind for kind in KINDS if recorded.startswith(kind))


def is_well_formed(recorded: str) -> bool:
    """Whether a text can be a fingerprint."""
    return re.fullmatch(f"(?:{XXH3}|{SUMS})[0-9a-f]{{32}}|[0-9a-f]{{64}}", recorded) is not None


def is_fingerprint(recorded: str | None, *tensors: Tensor) -> bool:
    """Whether `recorded`, of any kind, is the fingerprint of these tensors."""
    return recorded is not None and recorded == str(fingerprint(*tensors, kind=kind_of(recorded)))


def xxh3(*tensors: Tensor) -> str:
    """XXH3-128 of the shapes and values of `tensors`, with its prefix."""
    return XXH3 + _hexdigest(xxhash.xxh3_128(), tensors)


def sha256(*tensors: Tensor) -> str:
    """SHA-256 of the same."""
    return _hexdigest(hashlib.sha256(), tensors)


def _hexdigest(digest: Any, tensors: tuple[Tensor, ...]) -> str:
    for tensor in tensors:
        digest = _extended(digest, tensor.detach().cpu().contiguous())
    value: str = digest.hexdigest()
    return value


def _extended(digest: Any, tensor: Tensor) -> Any:
    """`digest` of one more tensor: in the first of bfloat16, float16 and its own dtype that holds it without loss."""
    if tensor.is_floating_point() and tensor.dtype != torch.bfloat16:
        for dtype in (torch.bfloat16, torch.float16):
            extended = _header(digest.copy(), dtype, tensor)
            for chunk in torch.split(tensor.view(-1), _CHUNK):
                narrow = chunk.to(dtype)
                if not torch.equal(narrow.to(tensor.dtype), chunk):
                    break
                extended.update(bytes_of(narrow))
            else:
                return extended
    digest = _header(digest, tensor.dtype, tensor)
    digest.update(bytes_of(tensor))
    return digest


def _header(digest: Any, dtype: torch.dtype, tensor: Tensor) -> Any:
    digest.update(f"{dtype} {tuple(tensor.shape)};".encode())
    return digest


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.view(-1).view(torch.uint8).numpy().data
