"""Decomposition: the truncated SVD of a weight, and PiSSA's split of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pissa.ops import _autograd  # noqa: F401  registers fakes and gradients
from pissa.ops._quant import QuantizedWeight, check_quantized_offset, quantized_weight
from pissa.ops._residual import quant_options, unchecked_residual
from pissa.ops.checks import (
    check_lengths,
    check_rank,
    check_scaling,
    check_svd,
    check_weight_and_bound,
    check_weights,
)

_OPS = torch.ops.pissa


class Split(NamedTuple):
    """PiSSA's split of a weight: `weight ~ residual + scaling * b0 @ a0`.

    `a0`: float32 [r, in], √(S/scaling) Vᵀ. `b0`: float32 [out, r], U √(S/scaling). `residual`: None (implicit: keep the
    weight itself), a tensor in the weight's dtype (explicit), or `QuantizedWeight` (QPiSSA).
    """

    a0: Tensor
    b0: Tensor
    residual: Tensor | QuantizedWeight | None
    taken: tuple[Tensor, Tensor] | None = None


def _exact_svd(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    return u[:, :r].contiguous(), s[:r].contiguous(), vh[:r].contiguous()


def _exact_split(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    u, s, vh = _exact_svd(weight, r)
    root = (s / scaling).sqrt()
    return root[:, None] * vh, u * root


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


def split(
    weight: Tensor,
    r: int,
    *,
    scaling: float = 1.0,
    svd: str = "krylov",
    passes: int | Literal["auto"] = "auto",
    seed: int = 0,
    form: str = "implicit",
    blocksize: int | None = None,
    double_quant: bool | None = None,
    quant_iters: int = 1,
) -> Split:
    """PiSSA's start factors of a weight and, if asked, its residual (arXiv 2404.02948, eq. 2-4 and 8).

    Args:
        weight, r, svd, passes, seed: see `svd_lowrank`.
        scaling: the adapter's scale s, `lora_alpha / r`; the factors are √(S/s) Vᵀ and U √(S/s).
        form: of the residual: "implicit" (none is formed), "explicit" (W - s B0 A0 in the weight's dtype), or one of
            `formats.FORMATS` (the same, quantised without being stored).
        blocksize, double_quant: of a quantised format; see `quantize`.
        quant_iters: T, alternations of SVD and quantisation. Only 1 is implemented.

    Raises:
        TypeError, ValueError: naming the argument; the weight is never changed.
    """
    weight, largest = check_weight_and_bound(weight)
    check_rank(r, weight)
    number = check_svd(svd, passes, seed)
    check_scaling(scaling)
    options = quant_options(form, ("implicit", "explicit"), blocksize, double_quant, weight)
    if quant_iters != 1:
        raise ValueError(f"quant_iters: got {quant_iters!r}; allowed: 1 (more alternations are not implemented yet)")
    if svd == "exact":
        a0, b0 = _exact_split(weight, r, scaling)
    elif options is not None:
        size, nested = options
        a0, b0, codes, absmax = _OPS.split_quantized(
            weight, largest, r, scaling, svd, number, seed, quant_iters, form, size
        )
        found = quantized_weight(form, codes, absmax, (weight.shape[0], weight.shape[1]), size, nested)
        return Split(a0, b0, check_quantized_offset(found))
    else:
        a0, b0 = _OPS.split(weight, largest, r, scaling, svd, number, seed)
    if form == "implicit":
        return Split(a0, b0, None)
    rest = unchecked_residual(weight, a0, b0, scaling, form, options)
    return Split(a0, b0, check_quantized_offset(rest) if isinstance(rest, QuantizedWeight) else rest)


def split_many(
    weights: Sequence[Tensor],
    ranks: Sequence[int],
    scalings: Sequence[float],
    *,
    svd: str = "krylov",
    passes: int | Literal["auto"] = "auto",
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> list[Split]:
    """`split` of many weights with implicit residuals, bit for bit, small weights side by side on one thread each.

    Args:
        weights: [out, in] each, of any shapes and dtypes that `split` takes.
        ranks, scalings: r and s of each weight.
        svd, passes, seed: see `svd_lowrank`; the same for all ("auto": as each rank needs).
        names: what errors call the weights; "weights[0]", "weights[1]", ... by default.

    Returns:
        What `split` returns, in the order of the weights.

    Raises:
        TypeError, ValueError: naming the argument, before anything is decomposed; the weights are never changed.
    """
    names = [f"weights[{i}]" for i in range(len(weights))] if names is None else names
    check_lengths({"ranks": ranks, "scalings": scalings, "names": names}, len(weights))
    number = check_svd(svd, passes, seed)
    weights, largest = check_weights(weights, names)
    for i, (weight, r, scaling) in enumerate(zip(weights, ranks, scalings, strict=True)):
        check_rank(r, weight, f"ranks[{i}]")
        check_scaling(scaling, f"scalings[{i}]")
    if not weights:  # no tensor, by which torch would find the op's kernel
        return []
    factors: Iterable[tuple[Tensor, Tensor]]
    if svd == "exact":
        factors = map(_exact_split, weights, ranks, scalings)
    else:
        factors = zip(*_OPS.split_many(weights, largest, ranks, scalings, svd, number, seed), strict=True)
    return [Split(a0, b0, None) for a0, b0 in factors]
