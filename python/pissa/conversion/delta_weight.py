"""The change that an adapter makes to one weight, and its factors, of a lower rank if wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from pissa.files.peft_layout import Matrices
from pissa.ops.low_rank import Spectrum, join_difference


class DeltaWeight(NamedTuple):
    """s (b a - b0 a0) [out, in]: float64 factors a, a0 [r, in], b, b0 [out, r]; without a start, s b a."""

    scaling: float
    a: Tensor
    b: Tensor
    start: Matrices | None = None

    @staticmethod
    def subtracted(scaling: float, a: Tensor, b: Tensor) -> DeltaWeight:
        """That of the factors [a ; a0] and [b | -b0]."""
        (a, a0), (b, minus_b0) = a.chunk(2), b.chunk(2, dim=1)
        return DeltaWeight(scaling, a, b, (a0, -minus_b0))

    def factors(self) -> Matrices:
        """Factors of b a - b0 a0, without cancellation: [a ; da] and [db | b0], or a and b."""
        if self.start is None:
            return self.a, self.b
        a0, b0 = self.start
        return join_difference(self.a, self.a - a0, self.b - b0, b0)


@dataclass(frozen=True)
class Converted:
    """The factors of one target, of more than one delta weight if they are experts'; all float64."""

    written: Sequence[Matrices]
    energy: float
    """‖s (b a - b0 a0)‖², Frobenius."""
    lost: float
    """The part of the energy that is left out."""

    @property
    def rank(self) -> int:
        return len(self.written[0][0])

    @staticmethod
    def of(deltas: Sequence[DeltaWeight], rank: int | None, energy: float | None) -> Converted:
        """Factors of the whole delta weights, or of their best approximation: of rank at most `rank`, or of the
        smallest rank that keeps the share `energy` of the energy of each."""
        exact = [delta.factors() for delta in deltas]
        spectra = [Spectrum.of(*factors) for factors in exact]
        if energy is not None:
            rank = max(spectrum.smallest_rank(energy) for spectrum in spectra)
        scale = deltas[0].scaling ** 2
        total = scale * sum(float(spectrum.energy[0]) for spectrum in spectra)
        if rank is None or rank >= len(exact[0][0]):
            return Converted(exact, total, 0.0)
        lost = sum(float(spectrum.energy[len(spectrum.values[:rank])]) for spectrum in spectra)
        return Converted([spectrum.factors(slice(rank)) for spectrum in spectra], total, scale * lost)
