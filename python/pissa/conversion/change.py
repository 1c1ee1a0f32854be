"""What an adapter adds to one weight, s (b a - b0 a0): factors of it without cancellation, of a lower rank if wanted,
and the comparison of what was written with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pissa.files.lora_folder import LoraFactors
from pissa.files.plain_lora import Matrices
from pissa.ops.low_rank import Spectrum

_FLOAT64 = 2.0**-53
# Of a factor's element when it is written in float32, after one rounding in float64: relative, and below 2^-126.
_FLOAT32, _SUBNORMAL = 2.0**-24 * (1 + 2.0**-20), 2.0**-150

# Random inputs of the comparison.
_PROBES = 8


class Change(NamedTuple):
    """s (b a - b0 a0) [out, in]: float64 factors a, a0 [r, in], b, b0 [out, r]; without a start s b a."""

    scaling: float
    a: Tensor
    b: Tensor
    start: Matrices | None = None

    @staticmethod
    def subtracted(scaling: float, a: Tensor, b: Tensor) -> Change:
        """The change of [b | -b0]·[a ; a0]."""
        (a, a0), (b, minus_b0) = a.chunk(2), b.chunk(2, dim=1)
        return Change(scaling, a, b, (a0, -minus_b0))

    def factors(self) -> Matrices:
        """[a ; da] and [db | b0], whose product is b a - b0 a0; or a and b."""
        if self.start is None:
            return self.a, self.b
        a0, b0 = self.start
        return torch.cat([self.a, self.a - a0]), torch.cat([self.b - b0, b0], dim=1)

    def of(self, x: Tensor) -> Tensor:
        """The change of the output for inputs x [in, n], as it is defined."""
        y = self.b @ (self.a @ x)
        if self.start is not None:
            y = y - self.start[1] @ (self.start[0] @ x)
        return self.scaling * y

    def size(self, x: Tensor) -> Tensor:
        """A bound of all terms in `of`, whose rounding errors are a small part of it."""
        terms = [(self.a, self.b), *([self.start] if self.start else [])]
        return abs(self.scaling) * sum((b.abs() @ (a.abs() @ x.abs()) for a, b in terms), torch.zeros(()))


@dataclass(frozen=True)
class Converted:
    """The changes of one target, more than one if they are experts', and their factors, those that are written and,
    with a lower rank, those that are left out; all float64."""

    target: LoraFactors
    changes: Sequence[Change]
    written: Sequence[Matrices]
    left_out: Sequence[Matrices] | None
    energy: float
    """‖s (b a - b0 a0)‖², Frobenius."""
    lost: float
    """Of it, that of what is left out."""

    @property
    def rank(self) -> int:
        return len(self.written[0][0])

    @staticmethod
    def of(target: LoraFactors, changes: Sequence[Change], rank: int | None, energy: float | None) -> Converted:
        """With the whole change, or the largest part of it of rank at most `rank`, or of the smallest rank that keeps
        the share `energy` of its energy."""
        exact = [change.factors() for change in changes]
        spectra = [Spectrum.of(*factors) for factors in exact]
        whole = len(exact[0][0])
        if energy is not None:
            rank = max(spectrum.smallest_rank(energy) for spectrum in spectra)
        scale = target.scaling**2
        total = scale * sum(float(spectrum.energy[0]) for spectrum in spectra)
        if rank is None or rank >= whole:
            return Converted(target, changes, exact, None, total, 0.0)
        kept, rest = slice(0, rank), slice(rank, None)
        return Converted(
            target,
            changes,
            [spectrum.factors(kept) for spectrum in spectra],
            [spectrum.factors(rest) for spectrum in spectra],
            total,
            scale * sum(float(spectrum.energy[len(spectrum.values[kept])]) for spectrum in spectra),
        )

    def error(self, scaling: float, found: Sequence[Matrices]) -> float:
        """Compares the changes with scaling and factors that were read back, and what was left out added to them, on
        random inputs.

        Returns:
            The largest error as a part of its bound. That follows from one rounding of each factor's element to
            float32, from the rounding of the products in float64 here, and, with a lower rank, from the backward error
            of QR and singular value decomposition.
        """
        generator = torch.Generator().manual_seed(0)
        worst = 0.0
        for i, (change, (a, b)) in enumerate(zip(self.changes, found, strict=True)):
            x = torch.randn(a.shape[1], _PROBES, dtype=torch.float64, generator=generator)
            y = scaling * (b @ (a @ x))
            exact_a, exact_b = (factor.abs() for factor in self.written[i])
            error_a, error_b = (_FLOAT32 * factor + _SUBNORMAL for factor in (exact_a, exact_b))
            bound = (exact_b + error_b) @ (error_a @ x.abs()) + error_b @ (exact_a @ x.abs())
            terms = change.size(x) + abs(scaling) * (b.abs() @ (a.abs() @ x.abs()))
            decomposition = 0.0
            if self.left_out is not None:
                rest_a, rest_b = self.left_out[i]
                y = y + change.scaling * (rest_b @ (rest_a @ x))
                terms = terms + abs(change.scaling) * (rest_b.abs() @ (rest_a.abs() @ x.abs()))
                whole_a, whole_b = change.factors()
                size = abs(change.scaling) * float(whole_a.norm() * whole_b.norm())
                decomposition = 10 * len(whole_a) * (a.shape[1] + len(b)) * _FLOAT64 * size
            products = (a.shape[1] + 3 * len(change.a) + len(a) + 8) * _FLOAT64
            bound = abs(scaling) * bound + products * terms + decomposition * x.norm(dim=0)
            error = (y - change.of(x)).abs()
            worst = max(worst, float((error / bound.clamp(min=torch.finfo(torch.float64).tiny)).max()))
        return worst
