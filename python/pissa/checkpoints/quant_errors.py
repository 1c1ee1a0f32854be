"""The error that a quantised base has, by each way to make it: plain quantisation, LoftQ, QPiSSA."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pissa import ops
from pissa.checkpoints.nuclear import NuclearNorm, nuclear_norm
from pissa.checkpoints.spectrum import norm_squared

PLAIN = "QLoRA"
METHODS: dict[str, dict[str, Any]] = {
    "LoftQ": {"quant_iters": 5, "quantise_first": True},
    "QPiSSA T=1": {},
    "QPiSSA T=5": {"quant_iters": 5},
}
"""Those with factors, and what `ops.split` is told; plain quantisation is called `PLAIN`."""


@dataclass(frozen=True)
class QuantError:
    """W - Q - s B A for one weight and one way to make Q, A and B, or for several weights together."""

    squared: float
    """The square of its Frobenius norm."""
    nuclear: NuclearNorm

    @staticmethod
    def total(errors: Iterable[QuantError]) -> QuantError:
        """That of several weights together."""
        errors = list(errors)
        return QuantError(sum(e.squared for e in errors), NuclearNorm.total(e.nuclear for e in errors))

    def relative(self, total: float) -> float:
        """The Frobenius norm in units of that of the weight, whose square is `total`; 0 for a weight of zeros."""
        return math.sqrt(self.squared / total) if total else 0.0

    def removed(self, plain: QuantError) -> tuple[float, float]:
        """The share of plain quantisation's error that is gone, in the nuclear norm as in the paper (arXiv 2404.02948,
        eq. 6): 1 - |W - Q - s B A|_* / |W - format(W)|_*; and its standard error."""
        quotient, standard_error = self.nuclear.over(plain.nuclear)
        return 1 - quotient, standard_error


def quant_errors(
    weight: Tensor, format: str, ranks: Iterable[int], *, exact: bool = False
) -> Iterator[tuple[str, int, QuantError]]:
    """The errors of a weight [out, in] in `format`, one at a time: method, rank (0 without factors), error. Each needs
    a float32 copy of the weight.

    Args:
        ranks: of the factors; a weight with a smaller side gets that side as its rank.
        exact: as in `nuclear_norm`.
    """
    yield PLAIN, 0, _error(weight, ops.quantize(weight, format), None, exact)
    for rank in ranks:
        for name, options in METHODS.items():
            found = ops.split(weight, min(rank, *weight.shape), form=format, **options)
            assert isinstance(found.residual, ops.QuantizedWeight)
            yield name, rank, _error(weight, found.residual, (found.a0, found.b0), exact)


def _error(
    weight: Tensor, quantised: ops.QuantizedWeight, factors: tuple[Tensor, Tensor] | None, exact: bool
) -> QuantError:
    base = ops.dequantize(quantised)
    if factors is not None:
        a0, b0 = factors
        base.addmm_(b0, a0)
    error = base.sub_(weight)
    return QuantError(norm_squared(error), nuclear_norm(error, exact=exact))
