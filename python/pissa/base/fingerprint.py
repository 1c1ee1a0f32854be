"""The fingerprints of a layer's base: those already known, and those computed for comparison with a recorded one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pissa.base.digest import Match, dtype_of, fingerprint, match
from pissa.base.protocol import Base, whole
from pissa.base.stored import residual_tensors
from pissa.distributed import is_sharded, whole_tensor


class Remembered:
    """The fingerprint of a frozen weight in its own dtype, computed on first use. Hashing a large model takes seconds,
    and a run saves many checkpoints of one base. A known fingerprint is kept after `fully_shard`, and after a write
    through `weight.data`, which leaves no trace."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._known: str | None = None

    def find(self, weight: Tensor) -> str | None:
        """The fingerprint of the values of `weight`; None if it is not known."""
        return self._known if is_sharded(weight) or _state(weight) == self._key else None

    def learn(self, weight: Tensor, value: str) -> str:
        """Stores the fingerprint of these values, and returns it."""
        self._key, self._known = _state(weight), value
        return value


def _state(weight: Tensor) -> tuple[object, ...]:
    """A key that changes with the values: the version counts changes in place, except those through `weight.data`. An
    inference tensor has no version, so its key never comes again."""
    version = object() if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.dtype


class Fingerprints:
    """The fingerprints of a layer's base: of its weight as a matrix, as it was given, and of the residual that a stored
    base keeps. Each is computed on first use and then remembered.

    `gathered`, below, is the whole parameter of the base's module. It is read if the parameter is sharded and the
    fingerprint is not known yet. A comparison gathers it itself, so all processes must compare together.
    """

    def __init__(self) -> None:
        self._weight, self._residual = Remembered(), Remembered()

    def of_weight(self, base: Base, gathered: Tensor | None = None) -> str:
        """The fingerprint of the weight."""
        return base.fingerprint or self._of(self._weight, base, lambda: [whole(base, gathered).matrix()])

    def of_residual(self, base: Base, gathered: Tensor | None = None) -> str:
        """The fingerprint of the residual of a stored base."""
        return self._of(self._residual, base, lambda: _kept(whole(base, gathered)))

    def _of(self, known: Remembered, base: Base, tensors: Callable[[], list[Tensor]]) -> str:
        found = known.find(base.parameter)
        if found is None:
            found = known.learn(base.parameter, fingerprint(*tensors(), dtype=base.fingerprint_dtype))
        return found

    def learn_weight(self, base: Base, value: str) -> None:
        """Stores a value of `of_weight` that comes from another process or from a file."""
        self._weight.learn(base.parameter, value)

    def learn_residual(self, base: Base, value: str) -> None:
        """Stores a value of `of_residual` that comes from another process."""
        self._residual.learn(base.parameter, value)

    def match_weight(self, base: Base, recorded: str) -> Match:
        """Compares the weight with a fingerprint. Of a weight that a stored base has replaced, only the fingerprint in
        its own dtype is known. If the given one has another dtype, the result is SAME, and `residual_is` decides."""
        own = base.fingerprint
        if own is None:
            return self._match(self._weight, base, recorded, lambda: [base.matrix()])
        return Match.OTHER if own != recorded and dtype_of(own) == dtype_of(recorded) else Match.SAME

    def residual_is(self, base: Base, recorded: str | None) -> bool:
        """Whether the residual of a stored base has this fingerprint."""
        kept = lambda: _kept(whole(base, whole_tensor(base.parameter)))  # noqa: E731
        return self._match(self._residual, base, recorded, kept) is Match.SAME

    def _match(self, known: Remembered, base: Base, recorded: str | None, tensors: Callable[[], list[Tensor]]) -> Match:
        if recorded is None:
            return Match.OTHER
        found = known.find(base.parameter)
        if found is not None and dtype_of(found) == dtype_of(recorded):
            return Match.SAME if found == recorded else Match.OTHER
        values = tensors()
        result = match(recorded, *values)
        if result is Match.SAME and values[0].dtype == dtype_of(recorded):
            known.learn(base.parameter, recorded)
        return result


def _kept(base: Base) -> list[Tensor]:
    assert base.residual is not None
    return list(residual_tensors(base.residual).values())
