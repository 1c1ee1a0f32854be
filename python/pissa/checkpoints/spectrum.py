"""The spectrum of a weight: its leading singular values, and the square of its norm, which gives the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pissa import ops

# Elements of a weight that are copied to float64 at once: 8 MB to add up, and columns for a product.
_ELEMENTS = 1 << 20
_COLUMNS = 2048


@dataclass(frozen=True)
class Spectrum:
    """What is known of the singular values of a weight [out, in]."""

    values: Tensor
    """float64 [k], descending: all of them, or the leading ones."""
    total: float
    """The square of the Frobenius norm: the sum of the squares of all singular values."""

    def energy(self, rank: int) -> float:
        """The share of the squared norm that the first `rank` (at most k) values hold; 1 of a weight of zeros."""
        held = float(self.values[:rank].square().sum())
        return min(held / self.total, 1.0) if self.total else 1.0

    def lost(self, rank: int) -> float:
        """The square of the norm that the first `rank` (at most k) values leave."""
        return self.total * (1 - self.energy(rank))

    @property
    def stable_rank(self) -> float:
        """The square of the Frobenius norm in units of that of the largest value: small if few directions dominate."""
        largest = float(self.values[0]) ** 2
        return self.total / largest if largest else 0.0


def spectrum_of(weight: Tensor, rank: int, *, exact: bool = False) -> Spectrum:
    """The spectrum of a weight [out, in], float32, bfloat16 or float16.

    Args:
        rank: how many of the leading values are wanted, at most min(out, in).
        exact: compute all values, in float64. That is slow: for 4096 x 11008 in bfloat16 one thread took 10 s in
            float32 already, where 16 leading values take it 0.25 s.

    Without `exact` the values are those of `ops.svd_lowrank`: never above the true ones, and what factors of PiSSA
    really hold. The total is a sum over all elements either way.

    Raises:
        ValueError: NaN or Inf in the weight, or a wrong rank.
    """
    if exact:
        return Spectrum(singular_values(weight), norm_squared(weight))
    _, values, _ = ops.svd_lowrank(weight, rank)
    return Spectrum(values.double().cpu(), norm_squared(weight))


def norm_squared(weight: Tensor) -> float:
    """The square of the Frobenius norm, summed in float64."""
    rows = max(1, _ELEMENTS // max(weight.shape[1], 1))
    parts = [weight[begin : begin + rows].double().square_().sum() for begin in range(0, weight.shape[0], rows)]
    return float(torch.stack(parts).sum())


def singular_values(weight: Tensor) -> Tensor:
    """All singular values, float64 [min(out, in)], descending: roots of the eigenvalues of the Gram matrix in float64,
    right to about 1e-8 of the largest."""
    wide = weight if weight.shape[0] <= weight.shape[1] else weight.mT
    gram = torch.zeros(wide.shape[0], wide.shape[0], dtype=torch.float64, device=weight.device)
    for begin in range(0, wide.shape[1], _COLUMNS):
        columns = wide[:, begin : begin + _COLUMNS].double()
        gram.addmm_(columns, columns.mT)
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram)
    return eigenvalues.flip(0).clamp(min=0).sqrt().cpu()
