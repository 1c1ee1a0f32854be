"""The truncated SVD of a weight, and start factors of weights by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pissa.ops import _autograd  # noqa: F401  registers fakes and gradients
from pissa.ops.checks import check_rank, check_svd, check_weight_and_bound

_OPS = torch.ops.pissa


def svd_lowrank(
    weight: Tensor, r: int, *, svd: str = "krylov", passes: int | Literal["auto"] = "auto", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading `r` singular triplets of a weight, as `torch.svd_lowrank` returns them.

    Args:
        weight: [out, in], float32, bfloat16 or float16, finite. Read in place, never copied to float32.
        r: 1 to min(out, in).
        svd: "krylov" (block Krylov, arXiv 1504.05477), "subspace" (Halko et al., arXiv 0909.4061; less memory for
            very large r) or "exact" (`torch.linalg.svd` in float32, for comparison: minutes for a large weight).
        passes: reads of the weight, an even number. "auto" takes 10 up to r = 64, 12 up to 96 and 14 beyond, or 28 with
            "subspace": on power-law spectra the factors then lose no more of the best rank-r part's energy than those
            of `torch.svd_lowrank` with niter = 16, which reads the weight 34 times. Flatter spectra, noise with some
            directions above it, take two passes more for that. Fewer are faster and lose more.
        seed: of the ±1 test matrix (Philox), the same on every device; the same seed gives the same bits for any number
            of threads, and again on the same GPU.

    Returns:
        U [out, r], S [r] (descending), V [in, r], float32, with orthonormal columns whatever the rank of the weight.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    weight, largest = check_weight_and_bound(weight)
    check_rank(r, weight)
    number = check_svd(svd, passes, seed)
    if svd == "exact":
        u, s, vh = _exact_svd(weight, r)
        return u, s, vh.mT
    ut, s, vt = _OPS.svd_lowrank(weight, largest, r, svd, number, seed)
    return ut.mT, s, vt.mT


class Factors(NamedTuple):
    """The leading r singular triplets of a weight as start factors: its best approximation of rank r is
    `scaling * b0 @ a0`."""

    a0: Tensor
    """float32 [r, in], √(S/scaling) Vᵀ."""
    b0: Tensor
    """float32 [out, r], U √(S/scaling)."""
    s: Tensor
    """float32 [r], the singular values, descending."""


class SvdOptions(NamedTuple):
    """How weights are decomposed, as `checks.check_svd` leaves it."""

    svd: str
    passes: int | None
    seed: int


def unchecked_factors(
    weights: Sequence[Tensor],
    largest: Sequence[float],
    ranks: Sequence[int],
    scalings: Sequence[float],
    options: SvdOptions,
) -> list[Factors]:
    """Start factors of one weight or more that are fit for it, `largest` being their largest elements. Small weights
    are decomposed side by side, on a GPU those of one shape together."""
    if options.svd == "exact":
        return list(map(_exact_factors, weights, ranks, scalings))
    found = _OPS.split_many(weights, largest, ranks, scalings, *options)
    return [Factors(*parts) for parts in zip(*found, strict=True)]


def _exact_svd(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    return u[:, :r].contiguous(), s[:r].contiguous(), vh[:r].contiguous()


def _exact_factors(weight: Tensor, r: int, scaling: float) -> Factors:
    u, s, vh = _exact_svd(weight, r)
    root = (s / scaling).sqrt()
    return Factors(root[:, None] * vh, u * root, s)
