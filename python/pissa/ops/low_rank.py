"""Products b a of low rank, in factors: the difference of two, and the best approximation of lower rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


def join_difference(a: Tensor, da: Tensor, db: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    """[a ; da] [2r, in] and [db | b0] [out, 2r]. Their product is b a - b0 a0, without cancellation, where a = a0 + da
    and b = b0 + db."""
    return torch.cat([a, da]), torch.cat([db, b0], dim=1)


def split_difference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inverse of `join_difference`: returns views a, da, db, b0."""
    (upper, da), (db, b0) = a.chunk(2), b.chunk(2, dim=1)
    return upper, da, db, b0


def pad_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Pads a [k, in] and b [out, k] with zeros to a rank of at least k. The product does not change. With rank k, the
    result is a and b themselves."""
    missing = rank - len(a)
    if missing == 0:
        return a, b
    return functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing))


def empty_factors(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of rank 0, float32, for a weight [out, in]."""
    rows, columns = weight.shape
    return weight.new_empty((0, columns), dtype=torch.float32), weight.new_empty((rows, 0), dtype=torch.float32)


class Spectrum(NamedTuple):
    """The singular value decomposition of b a [out, in] of rank at most k, float64."""

    left: Tensor
    """[out, k], orthonormal columns."""
    values: Tensor
    """[k], descending."""
    right: Tensor
    """[k, in], orthonormal rows."""

    @staticmethod
    def of(a: Tensor, b: Tensor) -> Spectrum:
        """Decomposes the product of b [out, k] and a [k, in], float64: QR factors of both, then the k x k core."""
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.mT)
        left, values, right = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        return Spectrum(q_b @ left, values, right @ q_a.mT)

    @property
    def energy(self) -> Tensor:
        """The sums of squares of the values from the i-th on, i from 0 to k: [0] is ‖b a‖², [r] is what rank r
        lacks."""
        squares = torch.cat([self.values.square(), self.values.new_zeros(1)])
        return squares.flip(0).cumsum(0).flip(0)

    def factors(self, ranks: slice) -> tuple[Tensor, Tensor]:
        """Factors a, b, with equal norms, of the part that has these values."""
        root = self.values[ranks].sqrt()
        return root[:, None] * self.right[ranks], self.left[:, ranks] * root
