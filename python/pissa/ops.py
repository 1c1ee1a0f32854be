"""The core as functions on tensors: truncated SVD, PiSSA's split, NF4, the fused linear layer.

Only torch is needed. Everything here validates its arguments and raises `ValueError` or `TypeError` that name the
argument, then calls `torch.ops.pissa.*` (the compiled ops; see cpp/pissa/torch/schema.cc), which work under `torch.compile`,
autocast, gradient checkpointing and `torch.func` fakes. Orientation is torch's: a weight is [out, in], y = x Wᵀ + b.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import _autograd  # noqa: F401  registers fakes and gradients
from ._check import (
    FLOATS,
    check_blocksize,
    check_change_scaling,
    check_devices,
    check_factors,
    check_frozen,
    check_product,
    check_rank,
    check_residual,
    check_scaling,
    check_svd,
    check_tensor,
    check_weight,
    check_weight_and_bound,
)
from ._load import _C

__all__ = [
    "Nf4Weight",
    "Split",
    "add_low_rank",
    "build_info",
    "linear",
    "nf4_dequantize",
    "nf4_quantize",
    "residual",
    "split",
    "split_many",
    "svd_lowrank",
]

_OPS = torch.ops.pissa


class Nf4Weight(NamedTuple):
    """A weight [out, in] in 4-bit NormalFloat, byte for byte as bitsandbytes stores it (QLoRA, arXiv 2305.14314).

    Blocks of `blocksize` elements run over the flattened weight and may cross rows. `codes`: uint8
    [ceil(out * in / 2)], the first of two elements in the high nibble. `absmax`: float32 [blocks]; or, with double
    quantisation, uint8 [blocks] together with `nested_absmax` float32 [ceil(blocks / 256)] and `offset` float32 [].
    At the default block size 64 that is 4.5 bits per weight, 4.127 nested.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    shape: tuple[int, int]
    blocksize: int

    @property
    def device(self) -> torch.device:
        return self.codes.device


class Split(NamedTuple):
    """PiSSA's split of a weight: `weight ~ residual + scaling * b0 @ a0`.

    `a0`: float32 [r, in], √(S/scaling) Vᵀ. `b0`: float32 [out, r], U √(S/scaling). `residual`: None (implicit: keep the
    weight itself), a tensor in the weight's dtype (explicit), or `Nf4Weight` (QPiSSA).
    """

    a0: Tensor
    b0: Tensor
    residual: Tensor | Nf4Weight | None


def build_info() -> dict[str, Any]:
    """Version, compiler, oldest supported torch, instruction set in use (`PISSA_ISA` overrides it), available ones.

    "cuda": None if the build has no CUDA library, else its "runtime" version and GPU "architectures". Whether it can be
    used here is another matter: a tensor on CUDA is refused with the reason if not; `pissa env` says it too.
    """
    return dict(_C.build_info())


# ---- Decomposition ---------------------------------------------------------------------------------------------------


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
    weight = check_weight(weight)
    check_rank(r, weight)
    number = check_svd(svd, passes, seed)
    if svd == "exact":
        u, s, vh = _exact_svd(weight, r)
        return u, s, vh.mT
    ut, s, vt = _OPS.svd_lowrank(weight, r, svd, number, seed)
    return ut.mT, s, vt.mT


def split(
    weight: Tensor,
    r: int,
    *,
    scaling: float = 1.0,
    svd: str = "krylov",
    passes: int | Literal["auto"] = "auto",
    seed: int = 0,
    residual: str = "implicit",
    blocksize: int = 64,
    double_quant: bool = True,
    quant_iters: int = 1,
) -> Split:
    """PiSSA's start factors of a weight and, if asked, its residual (arXiv 2404.02948, eq. 2-4 and 8).

    Args:
        weight, r, svd, passes, seed: see `svd_lowrank`.
        scaling: the adapter's scale s, `lora_alpha / r`; the factors are √(S/s) Vᵀ and U √(S/s).
        residual: "implicit" (none is formed), "explicit" (W - s B0 A0 in the weight's dtype), "nf4" (the same,
            quantised without being stored).
        blocksize, double_quant: of NF4; see `nf4_quantize`.
        quant_iters: T, alternations of SVD and quantisation. Only 1 is implemented.

    Raises:
        TypeError, ValueError: naming the argument; the weight is never changed.
    """
    weight = check_weight(weight)
    check_rank(r, weight)
    number = check_svd(svd, passes, seed)
    check_scaling(scaling)
    check_residual(residual, ("implicit", "explicit", "nf4"))
    check_blocksize(blocksize)
    if quant_iters != 1:
        raise ValueError(f"quant_iters: got {quant_iters!r}; allowed: 1 (more alternations are not implemented yet)")
    if svd == "exact":
        a0, b0 = _exact_split(weight, r, scaling)
    elif residual == "nf4":
        a0, b0, codes, absmax = _OPS.split_nf4(weight, r, scaling, svd, number, seed, quant_iters, blocksize)
        return Split(a0, b0, _nf4_weight(codes, absmax, weight, blocksize, double_quant))
    else:
        a0, b0 = _OPS.split(weight, r, scaling, svd, number, seed)
    if residual == "implicit":
        return Split(a0, b0, None)
    rest = _residual(weight, a0, b0, scaling, residual, blocksize, double_quant)
    return Split(a0, b0, rest)


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
    for argument, values in {"ranks": ranks, "scalings": scalings, "names": names}.items():
        if len(values) != len(weights):
            raise ValueError(f"{argument}: got {len(values)}; needed: one for each of the {len(weights)} weights")
    number = check_svd(svd, passes, seed)
    weights = [check_weight(weight, name) for weight, name in zip(weights, names, strict=True)]
    for i, (weight, r, scaling) in enumerate(zip(weights, ranks, scalings, strict=True)):
        check_rank(r, weight, f"ranks[{i}]")
        check_scaling(scaling, f"scalings[{i}]")
    check_devices(dict(zip(names, weights, strict=True)))
    if not weights:  # no tensor, by which torch would find the op's kernel
        return []
    factors: Iterable[tuple[Tensor, Tensor]]
    if svd == "exact":
        factors = map(_exact_split, weights, ranks, scalings)
    else:
        factors = zip(*_OPS.split_many(weights, ranks, scalings, svd, number, seed), strict=True)
    return [Split(a0, b0, None) for a0, b0 in factors]


def residual(
    weight: Tensor,
    a0: Tensor,
    b0: Tensor,
    *,
    scaling: float = 1.0,
    residual: str = "explicit",
    blocksize: int = 64,
    double_quant: bool = True,
) -> Tensor | Nf4Weight:
    """`weight - scaling * b0 @ a0` for given factors, "explicit" (in the weight's dtype) or "nf4"; bits as in `split`.

    Args:
        weight: [out, in], float32, bfloat16 or float16, finite.
        a0, b0: float32 [r, in] and [out, r].

    Raises:
        TypeError, ValueError: naming the argument.
    """
    weight, largest = check_weight_and_bound(weight)
    check_factors("a0", a0, "b0", b0, weight.shape[0], weight.shape[1])
    check_devices({"weight": weight, "a0": a0, "b0": b0})
    check_scaling(scaling)
    check_product(largest, a0, b0, scaling)
    check_residual(residual, ("explicit", "nf4"))
    check_blocksize(blocksize)
    return _residual(weight, a0.detach().float(), b0.detach().float(), scaling, residual, blocksize, double_quant)


def _residual(
    weight: Tensor, a0: Tensor, b0: Tensor, scaling: float, kind: str, blocksize: int, double_quant: bool
) -> Tensor | Nf4Weight:
    if kind == "explicit":
        rest: Tensor = _OPS.residual(weight, a0, b0, scaling)
        return rest
    codes, absmax = _OPS.residual_nf4(weight, a0, b0, scaling, blocksize)
    return _nf4_weight(codes, absmax, weight, blocksize, double_quant)


# ---- NF4 -------------------------------------------------------------------------------------------------------------


def _nf4_weight(codes: Tensor, absmax: Tensor, weight: Tensor, blocksize: int, double_quant: bool) -> Nf4Weight:
    shape = (weight.shape[0], weight.shape[1])
    if not double_quant:
        return Nf4Weight(codes, absmax, None, None, shape, blocksize)
    offset = _mean(absmax)
    if not math.isfinite(offset.item()):
        raise ValueError("weight: the mean of its scales overflows float32; use double_quant=False, or smaller weights")
    codes8, nested_absmax = _OPS.quantize_absmax(absmax, offset)
    return Nf4Weight(codes, codes8, nested_absmax, offset, shape, blocksize)


def _mean(absmax: Tensor) -> Tensor:
    """The mean to the same bits for any number of threads. Up to 32768 elements torch does not divide a sum among
    threads, and bitsandbytes' bytes follow from torch's own mean; beyond, they vary with the threads there."""
    if absmax.numel() <= 32768:
        return absmax.mean()
    head = absmax[: absmax.numel() // 1024 * 1024].view(-1, 1024)
    total = head.double().sum(1).sum() + absmax[head.numel() :].double().sum()
    return (total / absmax.numel()).float()


def nf4_quantize(weight: Tensor, *, blocksize: int = 64, double_quant: bool = True) -> Nf4Weight:
    """A weight [out, in] (float32, bfloat16 or float16, finite) in NF4: the bytes of `bitsandbytes.quantize_4bit`.

    Args:
        blocksize: elements per scale: 32, 64, ..., 4096.
        double_quant: quantise the scales too, to 8 bits in blocks of 256 (bitsandbytes' `compress_statistics`).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    weight = check_weight(weight)
    check_blocksize(blocksize)
    codes, absmax = _OPS.nf4_quantize(weight, blocksize)
    return _nf4_weight(codes, absmax, weight, blocksize, double_quant)


def nf4_dequantize(weight: Nf4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The [out, in] tensor in `dtype` (float32, bfloat16, float16): level * absmax, rounded once."""
    _check_nf4(weight)
    if dtype not in FLOATS:
        raise TypeError(f"dtype: got {dtype}; allowed: float32, bfloat16, float16")
    codes, absmax, nested_absmax, offset, (rows, cols), blocksize = weight
    dense: Tensor = _OPS.nf4_dequantize(codes, absmax, nested_absmax, offset, rows, cols, blocksize, dtype)
    return dense


def _check_nf4(weight: object) -> Nf4Weight:
    if not isinstance(weight, Nf4Weight):
        raise TypeError(f"weight: got {type(weight).__name__}; needed: Nf4Weight")
    check_tensor("weight.codes", weight.codes, (torch.uint8,))
    check_tensor("weight.absmax", weight.absmax, (torch.float32, torch.uint8))
    check_blocksize(weight.blocksize)
    rows, cols = weight.shape
    blocks = -(-rows * cols // weight.blocksize)
    if weight.codes.numel() != (rows * cols + 1) // 2 or weight.absmax.numel() != blocks:
        raise ValueError(
            f"weight: codes has {weight.codes.numel()} bytes and absmax {weight.absmax.numel()} elements; needed for "
            f"shape [{rows}, {cols}] and blocksize {weight.blocksize}: {(rows * cols + 1) // 2} and {blocks}"
        )
    nested = (weight.nested_absmax is not None, weight.offset is not None, weight.absmax.dtype == torch.uint8)
    if any(nested) != all(nested):
        raise ValueError("weight: nested scales need absmax uint8, nested_absmax and offset together")
    parts = {
        "codes": weight.codes,
        "absmax": weight.absmax,
        "nested_absmax": weight.nested_absmax,
        "offset": weight.offset,
    }
    check_devices({f"weight.{name}": part for name, part in parts.items()})
    return weight


# ---- Linear ----------------------------------------------------------------------------------------------------------


def _checked_factors(
    delta_a: Tensor,
    delta_b: Tensor,
    a0: Tensor | None,
    b0: Tensor | None,
    out_features: int,
    in_features: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The factors in float32, after checking that they fit each other and the layer."""
    check_factors("delta_a", delta_a, "delta_b", delta_b, out_features, in_features)
    if a0 is None or b0 is None:
        return delta_a.float(), delta_b.float(), None, None
    if check_tensor("a0", a0).shape != delta_a.shape:
        raise ValueError(f"a0: got shape {list(a0.shape)}; needed: that of delta_a, {list(delta_a.shape)}")
    check_factors("a0", a0, "b0", b0, out_features, in_features)
    check_frozen("a0", a0)
    check_frozen("b0", b0)
    return delta_a.float(), delta_b.float(), a0.float(), b0.float()


def linear(
    x: Tensor,
    weight: Tensor | Nf4Weight,
    bias: Tensor | None = None,
    *,
    delta_a: Tensor | None = None,
    delta_b: Tensor | None = None,
    a0: Tensor | None = None,
    b0: Tensor | None = None,
    scaling: float = 1.0,
    residual: str = "stored",
) -> Tensor:
    """A linear layer with a low-rank adapter, fused: one read of the weight, dense or 4-bit, forward and backward.

    With A = a0 + delta_a and B = b0 + delta_b (without a0 and b0: plain LoRA or QLoRA, A = delta_a, B = delta_b):

        no factors             y = x Wᵀ + bias
        residual="stored"      y = x Wᵀ + scaling (x Aᵀ) Bᵀ + bias                                 W is the residual
        residual="implicit"    y = x Wᵀ + scaling ((x Aᵀ) delta_bᵀ + (x delta_aᵀ) b0ᵀ) + bias      W is the whole weight

    Differentiable in x, bias, delta_a and delta_b; the gradients are PiSSA's (arXiv 2404.02948, section 3). weight, a0
    and b0 are frozen. Products accumulate in float32 and are rounded once, to y's dtype. With bfloat16 activations
    their factors are rounded to bfloat16 where the processor multiplies that faster, as mixed precision does. Up to 16
    rows of x are multiplied in another order than more: a row's last digits may depend on how many come with it.

    On CUDA, half-precision activations (float16 too) round the factors and a 4-bit weight to their dtype, and for more
    than 16 rows of x the sum is rounded to it once more, after the adapter's part. Everything is queued on the current
    stream, nothing waits: CUDA graphs can capture forward and backward.

    Args:
        x: [..., in], float32, bfloat16 or float16.
        weight: [out, in] in any of these dtypes, or `Nf4Weight`.
        bias: [out], or None.
        delta_a, a0: [r, in]. delta_b, b0: [out, r]. Given in pairs; computed with in float32.
        scaling: lora_alpha / r; any finite number.

    Returns:
        y: [..., out], in x's dtype; under autocast in autocast's.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    x = check_tensor("x", x)
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):  # which does not know the meta device
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if isinstance(weight, Nf4Weight):
        _check_nf4(weight)
        out_features, in_features = weight.shape
    else:
        check_tensor("weight", weight)
        if weight.dim() != 2:
            raise ValueError(f"weight: got shape {list(weight.shape)}; needed: [out, in]")
        check_frozen("weight", weight)
        out_features, in_features = weight.shape
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x: got shape {list(x.shape)}; needed: [..., in] with in = {in_features}")
    if bias is not None and (check_tensor("bias", bias).dim() != 1 or bias.shape[0] != out_features):
        raise ValueError(f"bias: got shape {list(bias.shape)}; needed: [{out_features}]")
    check_residual(residual, ("stored", "implicit"))
    check_change_scaling(scaling)
    if (delta_a is None) != (delta_b is None) or (a0 is None) != (b0 is None) or (a0 is not None and delta_a is None):
        raise ValueError("factors: give delta_a with delta_b, and a0 with b0 (beside the deltas), or none of them")
    if delta_a is not None and delta_b is not None:
        delta_a, delta_b, a0, b0 = _checked_factors(delta_a, delta_b, a0, b0, out_features, in_features)
    dense = weight.codes if isinstance(weight, Nf4Weight) else weight
    check_devices({"x": x, "weight": dense, "bias": bias, "delta_a": delta_a, "delta_b": delta_b, "a0": a0, "b0": b0})
    implicit = residual == "implicit"
    factors = (bias, delta_a, delta_b, a0, b0, float(scaling), implicit)
    y: Tensor
    if isinstance(weight, Nf4Weight):
        codes, absmax, nested_absmax, offset, _, blocksize = weight
        y, _ = _OPS.nf4_linear(x, codes, absmax, nested_absmax, offset, out_features, blocksize, *factors)
    else:
        y, _ = _OPS.linear(x, weight, *factors)
    return y


def add_low_rank(
    base: Tensor,
    x: Tensor,
    delta_a: Tensor,
    delta_b: Tensor,
    *,
    a0: Tensor | None = None,
    b0: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """`base` plus the change that an adapter makes to it, whatever function of x the base is.

        with a0 and b0     base + scaling ((x (a0 + delta_a)ᵀ) delta_bᵀ + (x delta_aᵀ) b0ᵀ)     PiSSA's change
        without            base + scaling (x delta_aᵀ) delta_bᵀ                                 plain LoRA

    PiSSA's change is `scaling (B A - b0 a0) x` without the cancellation, and exactly 0 at delta_a = delta_b = 0: the
    result then has base's bits. Differentiable in base, x, delta_a and delta_b. The sum is taken in float32 and
    rounded once.

    Args:
        base: [..., out], float32, bfloat16 or float16.
        x: [..., in] in any of these dtypes, with base's leading dimensions.
        delta_a, a0: [r, in]. delta_b, b0: [out, r]. Computed with in float32.
        scaling: lora_alpha / r; any finite number.

    Returns:
        [..., out] in base's dtype.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    base, x = check_tensor("base", base), check_tensor("x", x)
    if base.dim() < 1 or x.dim() < 1 or base.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"base: got shape {list(base.shape)}; needed: [..., out] with x's leading dimensions, {list(x.shape[:-1])}"
        )
    check_change_scaling(scaling)
    if (a0 is None) != (b0 is None):
        raise ValueError("factors: give a0 with b0, or neither")
    factors = _checked_factors(delta_a, delta_b, a0, b0, base.shape[-1], x.shape[-1])
    check_devices({"base": base, "x": x, "delta_a": delta_a, "delta_b": delta_b, "a0": a0, "b0": b0})
    y: Tensor
    y, _ = _OPS.add_low_rank(base, x, *factors, float(scaling), a0 is not None)
    return y
