"""Fingerprints that tell one base weight from another, the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import xxhash
from torch import Tensor

from pissa.base.protocol import Base, whole
from pissa.base.stored import residual_tensors
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
    a run saves many checkpoints of one base. After `fully_shard`, the value from before is kept."""

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
    """A key that changes with the values: the version counts changes in place."""
    return weight.data_ptr(), weight._version, weight.dtype


class Fingerprints:
    """The fingerprints of a layer's base: of its weight, a matrix, as it was given to us, and of the residual that a
    stored base keeps. Each is computed when it is first asked for, and then remembered.

    `gathered`, below, is the whole parameter of the base's module. It is read if the parameter is sharded and the
    fingerprint is not known yet.

    Raises:
        ValueError: the parameter is sharded, the fingerprint is not known, and nothing has been gathered.
    """

    def __init__(self) -> None:
        self._weight, self._residual = Remembered(), Remembered()

    def of_weight(self, base: Base, gathered: Tensor | None = None) -> str:
        """The fingerprint of the weight."""
        return base.fingerprint or self._weight.of(base.parameter, lambda: fingerprint(whole(base, gathered).matrix()))

    def of_residual(self, base: Base, gathered: Tensor | None = None) -> str:
        """The fingerprint of the residual of a stored base."""
        return self._residual.of(base.parameter, lambda: fingerprint(*_kept(whole(base, gathered))))

    def learn_weight(self, base: Base, value: str) -> None:
        """Takes the value of `of_weight` that another process, or a file, has."""
        self._weight.learn(base.parameter, value)

    def learn_residual(self, base: Base, value: str) -> None:
        """Takes the value of `of_residual` that another process has."""
        self._residual.learn(base.parameter, value)

    def weight_is(self, base: Base, recorded: str) -> bool:
        """Whether the weight has this fingerprint, XXH3 or SHA-256. The SHA-256 of a weight that a stored base has
        replaced is not known: the answer is yes then, and `residual_is` decides."""
        if not is_sha256(recorded):
            return self.of_weight(base) == recorded
        _check_whole(base)
        return base.fingerprint is not None or is_fingerprint(recorded, base.matrix())

    def residual_is(self, base: Base, recorded: str | None) -> bool:
        """Whether the residual of a stored base has this fingerprint, XXH3 or SHA-256."""
        if recorded is None or not is_sha256(recorded):
            return self.of_residual(base) == recorded
        _check_whole(base)
        return is_fingerprint(recorded, *_kept(base))


def would_be(recorded: str, base: Base, weight: Tensor) -> bool:
    """Whether a dense base will have this fingerprint, XXH3 or SHA-256, once its module has this weight."""
    return is_fingerprint(recorded, base.holding(weight.to(base.parameter.dtype)).matrix())


def _kept(base: Base) -> list[Tensor]:
    assert base.residual is not None
    return list(residual_tensors(base.residual).values())


def _check_whole(base: Base) -> None:
    if is_sharded(base.parameter):
        raise ValueError(
            "the base weight is sharded, and the folder knows it by its SHA-256 (format 1), of all its values: "
            "load the folder before the model is sharded; saved again, it has format 2"
        )
