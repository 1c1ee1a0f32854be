"""The fingerprints of a layer's base: those already known, and those computed for comparison with a recorded one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pissa.base.digest import Fingerprint, Match, dtype_of, fingerprint, kind_of, match
from pissa.base.protocol import Base, whole
from pissa.base.stored import residual_tensors
from pissa.distributed import is_sharded, whole_tensor


class Remembered:
    """The fingerprints of a frozen weight in its own dtype, one of each kind, each computed on first use. Hashing a
    large model takes seconds, and a run saves many checkpoints of one base. Known fingerprints are kept after
    `fully_shard`."""

    def __init__(self) -> None:
        self._key: tuple[int, int, torch.dtype] | None = None
        self._known: dict[str, Fingerprint] = {}

    def find(self, weight: Tensor, kind: str | None = None) -> Fingerprint | None:
        """The fingerprint of the values of `weight`, of that kind or of any; None if it is not known."""
        if not (is_sharded(weight) or _state(weight) == self._key):
            return None
        return next((found for found in self._known.values() if kind in (None, found.kind)), None)

    def learn(self, weight: Tensor, found: Fingerprint) -> Fingerprint:
        """Stores a fingerprint of these values, and returns it."""
        if _state(weight) != self._key:
            self._key, self._known = _state(weight), {}
        self._known[found.kind] = found
        return found


def _state(weight: Tensor) -> tuple[int, int, torch.dtype]:
    """A key that changes with the values: the version counts changes in place."""
    return weight.data_ptr(), weight._version, weight.dtype


class Fingerprints:
    """The fingerprints of a layer's base: of its weight as a matrix, as it was given, and of the residual that a stored
    base keeps. Each is computed on first use and then remembered.

    `gathered`, below, is the whole parameter of the base's module. It is read if the parameter is sharded and the
    fingerprint is not known yet. A comparison gathers it itself, so all processes must compare together.
    """

    def __init__(self) -> None:
        self._weight, self._residual = Remembered(), Remembered()

    def of_weight(self, base: Base, gathered: Tensor | None = None) -> Fingerprint:
        """A fingerprint of the weight."""
        return base.fingerprint or self._of(self._weight, base, lambda: [whole(base, gathered).matrix()])

    def of_residual(self, base: Base, gathered: Tensor | None = None) -> Fingerprint:
        """A fingerprint of the residual of a stored base."""
        return self._of(self._residual, base, lambda: _kept(whole(base, gathered)))

    def _of(self, known: Remembered, base: Base, tensors: Callable[[], list[Tensor]]) -> Fingerprint:
        found = known.find(base.parameter)
        if found is None:
            found = known.learn(base.parameter, fingerprint(*tensors(), dtype=base.fingerprint_dtype))
        return found

    def learn_weight(self, base: Base, value: str) -> None:
        """Stores a value of `of_weight` that comes from another process or from a file."""
        self._weight.learn(base.parameter, Fingerprint(value))

    def learn_residual(self, base: Base, value: str) -> None:
        """Stores a value of `of_residual` that comes from another process."""
        self._residual.learn(base.parameter, Fingerprint(value))

    def match_weight(self, base: Base, recorded: str) -> Match:
        """Compares the weight with a fingerprint of any kind. For a weight that a stored base has replaced, only one is
        known. If the given one has another kind or dtype, the result is SAME, and `residual_is` decides."""
        own = base.fingerprint
        if own is None:
            return self._match(self._weight, base, recorded, lambda: [base.matrix()])
        is_comparable = (own.kind, own.dtype) == (kind_of(recorded), dtype_of(recorded))
        return Match.OTHER if is_comparable and str(own) != recorded else Match.SAME

    def residual_is(self, base: Base, recorded: str | None) -> bool:
        """Whether the residual of a stored base has this fingerprint, of any kind."""
        kept = lambda: _kept(whole(base, whole_tensor(base.parameter)))  # noqa: E731
        return self._match(self._residual, base, recorded, kept) is Match.SAME

    def _match(self, known: Remembered, base: Base, recorded: str | None, tensors: Callable[[], list[Tensor]]) -> Match:
        if recorded is None:
            return Match.OTHER
        found = known.find(base.parameter, kind_of(recorded))
        if found is not None and found.dtype == dtype_of(recorded):
            return Match.SAME if str(found) == recorded else Match.OTHER
        values = tensors()
        result = match(recorded, *values)
        if result is Match.SAME and values[0].dtype == dtype_of(recorded):
            known.learn(base.parameter, Fingerprint(recorded))
        return result


def _kept(base: Base) -> list[Tensor]:
    assert base.residual is not None
    return list(residual_tensors(base.residual).values())
