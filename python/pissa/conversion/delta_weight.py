"""The change that an adapter makes to one weight, its factors, of a lower rank if wanted, and the check of factors that
were written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pissa.files.lora_folder import LoraFactors
from pissa.files.peft_layout import Matrices
from pissa.ops.low_rank import Spectrum, join_difference

_FLOAT64 = 2.0**-53
# Of a factor's element when it is written in float32, after one rounding in float64: relative, and below 2^-126.
_FLOAT32, _SUBNORMAL = 2.0**-24 * (1 + 2.0**-20), 2.0**-150

# Random inputs of the comparison.
_PROBES = 8


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

    def product(self, x: Tensor) -> Tensor:
        """The product with inputs x [in, n], by the definition."""
        y = self.b @ (self.a @ x)
        if self.start is not None:
            y = y - self.start[1] @ (self.start[0] @ x)
        return self.scaling * y

    def product_size(self, x: Tensor) -> Tensor:
        """The sum of the magnitudes of all terms in `product`, to which its rounding errors are proportional."""
        terms = [(self.a, self.b), *([self.start] if self.start else [])]
        return abs(self.scaling) * sum((b.abs() @ (a.abs() @ x.abs()) for a, b in terms), torch.zeros(()))


@dataclass(frozen=True)
class Converted:
    """One target: its delta weights, more than one if they are experts', and the factors of each; all float64."""

    target: LoraFactors
    deltas: Sequence[DeltaWeight]
    written: Sequence[Matrices]
    left_out: Sequence[Matrices] | None
    """The rest, if a lower rank is written."""
    energy: float
    """‖s (b a - b0 a0)‖², Frobenius."""
    lost: float
    """The part of the energy that is left out."""

    @property
    def rank(self) -> int:
        return len(self.written[0][0])

    @staticmethod
    def of(target: LoraFactors, deltas: Sequence[DeltaWeight], rank: int | None, energy: float | None) -> Converted:
        """Factors of the whole delta weights, or of their best approximation: of rank at most `rank`, or of the
        smallest rank that keeps the share `energy` of the energy of each."""
        exact = [delta.factors() for delta in deltas]
        spectra = [Spectrum.of(*factors) for factors in exact]
        whole = len(exact[0][0])
        if energy is not None:
            rank = max(spectrum.smallest_rank(energy) for spectrum in spectra)
        scale = target.scaling**2
        total = scale * sum(float(spectrum.energy[0]) for spectrum in spectra)
        if rank is None or rank >= whole:
            return Converted(target, deltas, exact, None, total, 0.0)
        kept, rest = slice(0, rank), slice(rank, None)
        return Converted(
            target,
            deltas,
            [spectrum.factors(kept) for spectrum in spectra],
            [spectrum.factors(rest) for spectrum in spectra],
            total,
            scale * sum(float(spectrum.energy[len(spectrum.values[kept])]) for spectrum in spectra),
        )

    def error(self, scaling: float, found: Sequence[Matrices]) -> float:
        """Compares the delta weights with factors that were read back, on random inputs. The rest, if a lower rank was
        written, is added to them.

        Returns:
            The largest error as a part of its bound. The bound follows from one rounding of each factor's element to
            float32, from the rounding of the products in float64 here, and, with a lower rank, from the backward error
            of QR and singular value decomposition.
        """
        generator = torch.Generator().manual_seed(0)
        worst = 0.0
        for i, (delta, (a, b)) in enumerate(zip(self.deltas, found, strict=True)):
            x = torch.randn(a.shape[1], _PROBES, dtype=torch.float64, generator=generator)
            y = scaling * (b @ (a @ x))
            exact_a, exact_b = (factor.abs() for factor in self.written[i])
            error_a, error_b = (_FLOAT32 * factor + _SUBNORMAL for factor in (exact_a, exact_b))
            bound = (exact_b + error_b) @ (error_a @ x.abs()) + error_b @ (exact_a @ x.abs())
            terms = delta.product_size(x) + abs(scaling) * (b.abs() @ (a.abs() @ x.abs()))
            decomposition = 0.0
            if self.left_out is not None:
                rest_a, rest_b = self.left_out[i]
                y = y + delta.scaling * (rest_b @ (rest_a @ x))
                terms = terms + abs(delta.scaling) * (rest_b.abs() @ (rest_a.abs() @ x.abs()))
                whole_a, whole_b = delta.factors()
                size = abs(delta.scaling) * float(whole_a.norm() * whole_b.norm())
                decomposition = 10 * len(whole_a) * (a.shape[1] + len(b)) * _FLOAT64 * size
            products = (a.shape[1] + 3 * len(delta.a) + len(a) + 8) * _FLOAT64
            bound = abs(scaling) * bound + products * terms + decomposition * x.norm(dim=0)
            error = (y - delta.product(x)).abs()
            worst = max(worst, float((error / bound.clamp(min=torch.finfo(torch.float64).tiny)).max()))
        return worst
