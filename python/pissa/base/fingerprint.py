"""Fingerprints that tell one base weight from another, the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import xxhash
from torch import Tensor

from pissa.distributed import is_sharded

_XXH3 = "xxh3:"
_CHUNK = 1 << 16
"""Elements that are narrowed at once: they stay in the cache from the first reading to the last."""


def fingerprint(*tensors: Tensor) -> str:
    """XXH3-128 of the shapes and values of `tensors`: "xxh3:" and 32 hexadecimal digits.

    A floating tensor counts by its values, not by the dtype that holds them: a bfloat16 checkpoint loaded in
    float32 has the fingerprint of the same checkpoint loaded in bfloat16.
    """
    return _XXH3 + _hexdigest(xxhash.xxh3_128(), tensors)


def sha256(*tensors: Tensor) -> str:
    """SHA-256 of the same, 64 hexadecimal digits: a fingerprint in a pissa.json of format 1."""
    return _hexdigest(hashlib.sha256(), tensors)


def is_fingerprint(recorded: str | None, *tensors: Tensor) -> bool:
    """Whether `recorded`, of either kind, is the fingerprint of these tensors."""
    return recorded == (sha256 if recorded is not None and is_sha256(recorded) else fingerprint)(*tensors)


def is_sha256(recorded: str) -> bool:
    """Whether a fingerprint that was read is one of `sha256`."""
    return not recorded.startswith(_XXH3)


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
                extended.update(_bytes(narrow))
            else:
                return extended
    digest = _header(digest, tensor.dtype, tensor)
    digest.update(_bytes(tensor))
    return digest


def _header(digest: Any, dtype: torch.dtype, tensor: Tensor) -> Any:
    digest.update(f"{dtype} {tuple(tensor.shape)};".encode())
    return digest


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


class Remembered:
    """The fingerprint of a frozen weight, computed when it is first asked for: hashing a large model takes seconds, and
    a run saves many checkpoints of one base. What `fully_shard` has distributed keeps the one from before."""

    def __init__(self) -> None:
        self._key: tuple[int, int, torch.dtype] | None = None
        self._value: str | None = None

    def of(self, weight: Tensor, compute: Callable[[], str]) -> str:
        """`compute()`, or what it was for the same values of `weight`."""
        if self._value is None or not (is_sharded(weight) or _state(weight) == self._key):
            self._key, self._value = _state(weight), compute()
        return self._value

    def learn(self, weight: Tensor, value: str) -> None:
        """Takes `value`, which another process has computed for the same values."""
        self._key, self._value = _state(weight), value


def _state(weight: Tensor) -> tuple[int, int, torch.dtype]:
    """Differs when the values do; the version counts changes in place."""
    return weight.data_ptr(), weight._version, weight.dtype
