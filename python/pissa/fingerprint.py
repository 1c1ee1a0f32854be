"""Fingerprints that tell one base weight from another, the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from pissa.distributed import is_sharded


def fingerprint(*tensors: Tensor) -> str:
    """SHA-256 of the shapes and values of `tensors`, in hexadecimal.

    A floating tensor counts by its values, not by the dtype that holds them: a bfloat16 checkpoint loaded in
    float32 has the fingerprint of the same checkpoint loaded in bfloat16.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        narrow = _narrowest(tensor.detach().cpu().contiguous())
        digest.update(f"{narrow.dtype} {tuple(narrow.shape)};".encode())
        digest.update(narrow.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _narrowest(tensor: Tensor) -> Tensor:
    """`tensor` in the first of bfloat16, float16 and its own dtype that holds it without loss."""
    if tensor.is_floating_point():
        for dtype in (torch.bfloat16, torch.float16):
            narrow = tensor.to(dtype)
            if torch.equal(narrow.to(tensor.dtype), tensor):
                return narrow
    return tensor


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
