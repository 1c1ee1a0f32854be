"""The fingerprints of a layer's base, remembered: hashing a large model takes seconds, and a run saves many checkpoints
of one base."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from pissa.base.digest import Match, dtype_of, fingerprint, match
from pissa.base.protocol import Base, unshard
from pissa.base.stored import residual_tensors
from pissa.distributed import is_sharded, whole_tensor


class ResidualFingerprint:
    """The fingerprint of the residual that a layer's stored base keeps, computed on first use. A known one is kept
    after `fully_shard`, and after a write through `weight.data`, which leaves no trace."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._known: str | None = None

    def _tensors(self, base: Base) -> Iterable[Tensor]:
        assert base.residual is not None
        return residual_tensors(base.residual).values()

    def of(self, base: Base, gathered: Tensor | None = None) -> str:
        """The fingerprint of the layer's base. `gathered` is the whole parameter of the base's module. It is read if
        the parameter is sharded and the fingerprint is not known yet."""
        if (known := self._recall(base)) is not None:
            return known
        value = fingerprint(*self._tensors(unshard(base, gathered)), dtype=base.fingerprint_dtype)
        self.remember(base, value)
        return value

    def remember(self, base: Base, value: str) -> None:
        """Stores a value of `of` that comes from another process or from a file."""
        self._key, self._known = tensor_state(base.parameter), value

    def match(self, base: Base, recorded: str | None) -> Match:
        """Compares the layer's base with a fingerprint. A sharded parameter is gathered, so all processes must compare
        together."""
        if recorded is None:
            return Match.OTHER
        known = self._recall(base)
        if known is not None and dtype_of(known) == dtype_of(recorded):
            return Match.SAME if known == recorded else Match.OTHER
        first, *others = self._tensors(unshard(base, whole_tensor(base.parameter)))
        result = match(recorded, first, *others)
        if result is Match.SAME and first.dtype == dtype_of(recorded):
            self.remember(base, recorded)
        return result

    def _recall(self, base: Base) -> str | None:
        return self._known if is_sharded(base.parameter) or tensor_state(base.parameter) == self._key else None


class WeightFingerprint(ResidualFingerprint):
    """The same for the base's weight as a matrix, as it was given. A stored base knows that of the weight which it has
    replaced."""

    def _tensors(self, base: Base) -> Iterable[Tensor]:
        return [base.matrix()]

    def of(self, base: Base, gathered: Tensor | None = None) -> str:
        return base.fingerprint or super().of(base, gathered)

    def match(self, base: Base, recorded: str | None) -> Match:
        """Compares the weight with a fingerprint. Of a weight that a stored base has replaced, only the fingerprint in
        its own dtype is known. If the given one has another dtype, the result is SAME, and the residual decides."""
        own = base.fingerprint
        if own is None or recorded is None:
            return super().match(base, recorded)
        return Match.OTHER if own != recorded and dtype_of(own) == dtype_of(recorded) else Match.SAME


def tensor_state(weight: Tensor) -> tuple[object, ...]:
    """A key that changes with the values: the version counts changes in place, except those through `weight.data`. An
    inference tensor has no version, so its key never comes again."""
    version = object() if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.dtype
