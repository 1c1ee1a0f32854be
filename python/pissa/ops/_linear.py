"""The linear layer with a low-rank adapter, fused; and the adapter's part alone."""

from __future__ import annotations

import torch
from torch import Tensor

from pissa.ops import _autograd  # noqa: F401  registers fakes and gradients
from pissa.ops._check import (
    check_change_scaling,
    check_devices,
    check_factors,
    check_frozen,
    check_residual,
    check_tensor,
)
from pissa.ops._quant import Nf4Weight, check_nf4

_OPS = torch.ops.pissa


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
        check_nf4(weight)
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
