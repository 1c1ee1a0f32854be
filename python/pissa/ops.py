"""The core as functions on tensors: truncated SVD, PiSSA's split, NF4, the fused linear layer.

Only torch is needed. Everything here validates its arguments and raises `ValueError` or `TypeError` that name the
argument, then calls `torch.ops.pissa.*` (the compiled ops; see cpp/torch/schema.cc), which work under `torch.compile`,
autocast, gradient checkpointing and `torch.func` fakes. Orientation is torch's: a weight is [out, in], y = x Wᵀ + b.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _autograd  # noqa: F401  registers fakes and gradients
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
    "svd_lowrank",
]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
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
    """Version, compiler, oldest supported torch, instruction set in use (`PISSA_ISA` overrides it), available ones."""
    return dict(_C.build_info())


# ---- Validation ------------------------------------------------------------------------------------------------------


def _check_tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...] = _FLOATS) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}; needed: a torch.Tensor")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: got dtype {str(value.dtype).removeprefix('torch.')}; allowed: {allowed}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got layout {value.layout}; needed: a dense (strided) tensor")
    if value.device.type not in ("cpu", "meta"):
        raise ValueError(
            f"{name}: is on {value.device}; this build of pissa computes on the CPU: move it with .to('cpu')"
        )
    return value


def _check_weight(weight: object) -> Tensor:
    """A finite, dense [out, in] weight, detached: what is decomposed or quantised carries no gradient."""
    tensor = _check_tensor("weight", weight)
    if tensor.dim() != 2 or tensor.numel() == 0:
        raise ValueError(f"weight: got shape {list(tensor.shape)}; needed: [out, in], not empty")
    if tensor.device.type == "meta":
        raise ValueError("weight: is on the meta device and holds no values; load the weights first")
    if not all(math.isfinite(bound.item()) for bound in tensor.detach().aminmax()):
        raise ValueError("weight: contains NaN or Inf; only finite weights can be decomposed or quantised")
    return tensor.detach()


def _check_rank(r: object, weight: Tensor) -> int:
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r: got {type(r).__name__}; needed: int")
    if not 1 <= r <= min(weight.shape):
        raise ValueError(
            f"r: got {r}; allowed: 1 to min(out, in) = {min(weight.shape)} for a weight of shape {list(weight.shape)}"
        )
    return r


def _check_svd(svd: str, passes: int, seed: int) -> None:
    if svd not in ("krylov", "subspace", "exact"):
        raise ValueError(f"svd: got {svd!r}; allowed: 'krylov', 'subspace', 'exact'")
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 2 or passes % 2:
        raise ValueError(f"passes: got {passes!r}; allowed: an even number of at least 2 (8 and 12 are usual)")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed: got {seed!r}; allowed: 0 to 2^63 - 1")


def _check_blocksize(blocksize: int) -> None:
    if blocksize not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise ValueError(f"blocksize: got {blocksize!r}; allowed: 32, 64, 128, 256, 512, 1024, 2048, 4096")


def _check_scaling(scaling: float) -> None:
    if not isinstance(scaling, (int, float)) or not math.isfinite(scaling) or scaling <= 0:
        raise ValueError(f"scaling: got {scaling!r}; allowed: a positive number (lora_alpha / r)")


# ---- Decomposition ---------------------------------------------------------------------------------------------------


def _exact_svd(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    return u[:, :r].contiguous(), s[:r].contiguous(), vh[:r].contiguous()


def svd_lowrank(
    weight: Tensor, r: int, *, svd: str = "krylov", passes: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading `r` singular triplets of a weight, as `torch.svd_lowrank` returns them.

    Args:
        weight: [out, in], float32, bfloat16 or float16, finite. Read in place, never copied to float32.
        r: 1 to min(out, in).
        svd: "krylov" (block Krylov, arXiv 1504.05477), "subspace" (Halko et al., arXiv 0909.4061; less memory for
            very large r) or "exact" (`torch.linalg.svd` in float32, for comparison: minutes for a large weight).
        passes: reads of the weight, even. With "krylov", 8 and 12 match or beat `torch.svd_lowrank` with
            niter = 8 and 16, which read it 18 and 34 times.
        seed: of the ±1 test matrix (Philox); the same seed gives the same bits for any number of threads.

    Returns:
        U [out, r], S [r] (descending), V [in, r], float32, with orthonormal columns whatever the rank of the weight.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    weight = _check_weight(weight)
    _check_rank(r, weight)
    _check_svd(svd, passes, seed)
    if svd == "exact":
        u, s, vh = _exact_svd(weight, r)
        return u, s, vh.mT
    ut, s, vt = _OPS.svd_lowrank(weight, r, svd, passes, seed)
    return ut.mT, s, vt.mT


def split(
    weight: Tensor,
    r: int,
    *,
    scaling: float = 1.0,
    svd: str = "krylov",
    passes: int = 8,
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
    weight = _check_weight(weight)
    _check_rank(r, weight)
    _check_svd(svd, passes, seed)
    _check_scaling(scaling)
    _check_residual(residual, ("implicit", "explicit", "nf4"))
    _check_blocksize(blocksize)
    if quant_iters != 1:
        raise ValueError(f"quant_iters: got {quant_iters!r}; allowed: 1 (more alternations are not implemented yet)")
    if svd == "exact":
        u, s, vh = _exact_svd(weight, r)
        root = (s / scaling).sqrt()
        a0, b0 = root[:, None] * vh, u * root
    elif residual == "nf4":
        a0, b0, codes, absmax = _OPS.split_nf4(weight, r, scaling, svd, passes, seed, quant_iters, blocksize)
        return Split(a0, b0, _nf4_weight(codes, absmax, weight, blocksize, double_quant))
    else:
        a0, b0 = _OPS.split(weight, r, scaling, svd, passes, seed)
    if residual == "implicit":
        return Split(a0, b0, None)
    rest = _residual(weight, a0, b0, scaling, residual, blocksize, double_quant)
    return Split(a0, b0, rest)


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
    weight = _check_weight(weight)
    _check_factors("a0", a0, "b0", b0, weight.shape[0], weight.shape[1])
    _check_scaling(scaling)
    _check_residual(residual, ("explicit", "nf4"))
    _check_blocksize(blocksize)
    return _residual(weight, a0.detach().float(), b0.detach().float(), scaling, residual, blocksize, double_quant)


def _check_residual(residual: str, allowed: tuple[str, ...]) -> None:
    if residual not in allowed:
        raise ValueError(f"residual: got {residual!r}; allowed: {', '.join(map(repr, allowed))}")


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
    weight = _check_weight(weight)
    _check_blocksize(blocksize)
    codes, absmax = _OPS.nf4_quantize(weight, blocksize)
    return _nf4_weight(codes, absmax, weight, blocksize, double_quant)


def nf4_dequantize(weight: Nf4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The [out, in] tensor in `dtype` (float32, bfloat16, float16): level * absmax, rounded once."""
    _check_nf4(weight)
    if dtype not in _FLOATS:
        raise TypeError(f"dtype: got {dtype}; allowed: float32, bfloat16, float16")
    codes, absmax, nested_absmax, offset, (rows, cols), blocksize = weight
    dense: Tensor = _OPS.nf4_dequantize(codes, absmax, nested_absmax, offset, rows, cols, blocksize, dtype)
    return dense


def _check_nf4(weight: object) -> Nf4Weight:
    if not isinstance(weight, Nf4Weight):
        raise TypeError(f"weight: got {type(weight).__name__}; needed: Nf4Weight")
    _check_tensor("weight.codes", weight.codes, (torch.uint8,))
    _check_tensor("weight.absmax", weight.absmax, (torch.float32, torch.uint8))
    _check_blocksize(weight.blocksize)
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
    return weight


# ---- Linear ----------------------------------------------------------------------------------------------------------


def _check_factors(name_a: str, a: object, name_b: str, b: object, out_features: int, in_features: int) -> None:
    a, b = _check_tensor(name_a, a), _check_tensor(name_b, b)
    if a.dim() != 2 or a.shape[0] < 1 or a.shape[1] != in_features:
        raise ValueError(f"{name_a}: got shape {list(a.shape)}; needed: [r, in] = [r >= 1, {in_features}]")
    if b.dim() != 2 or tuple(b.shape) != (out_features, a.shape[0]):
        raise ValueError(f"{name_b}: got shape {list(b.shape)}; needed: [out, r] = [{out_features}, {a.shape[0]}]")


def _check_frozen(name: str, tensor: Tensor | None) -> None:
    if tensor is not None and tensor.requires_grad:
        raise ValueError(f"{name}: requires grad, but is frozen here and would get none; pass {name}.detach()")


def _checked_factors(
    delta_a: Tensor,
    delta_b: Tensor,
    a0: Tensor | None,
    b0: Tensor | None,
    out_features: int,
    in_features: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The factors in float32, after checking that they fit each other and the layer."""
    _check_factors("delta_a", delta_a, "delta_b", delta_b, out_features, in_features)
    if a0 is None or b0 is None:
        return delta_a.float(), delta_b.float(), None, None
    if _check_tensor("a0", a0).shape != delta_a.shape:
        raise ValueError(f"a0: got shape {list(a0.shape)}; needed: that of delta_a, {list(delta_a.shape)}")
    _check_factors("a0", a0, "b0", b0, out_features, in_features)
    _check_frozen("a0", a0)
    _check_frozen("b0", b0)
    return delta_a.float(), delta_b.float(), a0.float(), b0.float()


def _check_devices(x: Tensor, **tensors: Tensor | Nf4Weight | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: is on {tensor.device}, but x is on {x.device}; move them to one device")


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
    and b0 are frozen. Products accumulate in float32 and are rounded once, to y's dtype.

    Args:
        x: [..., in], float32, bfloat16 or float16.
        weight: [out, in] in any of these dtypes, or `Nf4Weight`.
        bias: [out], or None.
        delta_a, a0: [r, in]. delta_b, b0: [out, r]. Given in pairs; computed with in float32.
        scaling: lora_alpha / r.

    Returns:
        y: [..., out], in x's dtype; under autocast in autocast's.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    x = _check_tensor("x", x)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if isinstance(weight, Nf4Weight):
        _check_nf4(weight)
        out_features, in_features = weight.shape
    else:
        _check_tensor("weight", weight)
        if weight.dim() != 2:
            raise ValueError(f"weight: got shape {list(weight.shape)}; needed: [out, in]")
        _check_frozen("weight", weight)
        out_features, in_features = weight.shape
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x: got shape {list(x.shape)}; needed: [..., in] with in = {in_features}")
    if bias is not None and (_check_tensor("bias", bias).dim() != 1 or bias.shape[0] != out_features):
        raise ValueError(f"bias: got shape {list(bias.shape)}; needed: [{out_features}]")
    _check_residual(residual, ("stored", "implicit"))
    _check_scaling(scaling)
    if (delta_a is None) != (delta_b is None) or (a0 is None) != (b0 is None) or (a0 is not None and delta_a is None):
        raise ValueError("factors: give delta_a with delta_b, and a0 with b0 (beside the deltas), or none of them")
    if delta_a is not None and delta_b is not None:
        delta_a, delta_b, a0, b0 = _checked_factors(delta_a, delta_b, a0, b0, out_features, in_features)
    _check_devices(x, weight=weight, bias=bias, delta_a=delta_a, delta_b=delta_b, a0=a0, b0=b0)
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
        scaling: lora_alpha / r.

    Returns:
        [..., out] in base's dtype.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    base, x = _check_tensor("base", base), _check_tensor("x", x)
    if base.dim() < 1 or x.dim() < 1 or base.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"base: got shape {list(base.shape)}; needed: [..., out] with x's leading dimensions, {list(x.shape[:-1])}"
        )
    _check_scaling(scaling)
    if (a0 is None) != (b0 is None):
        raise ValueError("factors: give a0 with b0, or neither")
    factors = _checked_factors(delta_a, delta_b, a0, b0, base.shape[-1], x.shape[-1])
    _check_devices(x, base=base, delta_a=delta_a, delta_b=delta_b, a0=a0, b0=b0)
    y: Tensor
    y, _ = _OPS.add_low_rank(base, x, *factors, float(scaling), a0 is not None)
    return y
