"""The linear layer with a low-rank adapter, fused, and the adapter's part by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, get_autocast_dtype
from torch.amp import is_autocast_available

from pissa.ops import _autograd
from pissa.ops._load import has_kernels
from pissa.ops._quant import QuantizedWeight, check_quantized
from pissa.ops.checks import (
    FLOATS,
    check_change_scaling,
    check_devices,
    check_factors,
    check_frozen,
    check_tensor,
    shape_error,
)

Factors = Mapping[str, Tensor | None]
"""a, b, a0 and b0 by name."""


def check_adapter(factors: Factors, out_features: int, in_features: int) -> None:
    """Checks that a, b, a0 and b0, or the first two, or none are given, and that they fit each other and the layer."""
    a, b, a0, b0 = factors.values()
    if (a is None) != (b is None) or (a0 is None) != (b0 is None) or (a0 is not None and a is None):
        raise ValueError("factors: give a with b, and a0 with b0 in addition, or none of them [P124]")
    if a is not None and b is not None:
        check_factors("a", a, "b", b, out_features, in_features)
    for name, start, factor in (("a0", a0, a), ("b0", b0, b)):
        if start is not None and factor is not None and check_tensor(name, start).shape != factor.shape:
            raise shape_error(name, start, f"that of {name[0]}, {list(factor.shape)}")
    check_frozen(a0=a0, b0=b0)


def as_float32(factor: Tensor | None) -> Tensor | None:
    """A factor as the ops take it."""
    return factor.float() if factor is not None and factor.dtype in FLOATS else factor


def check_operands(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Tensor:
    """Checks that the operands of x Wᵀ + bias fit, and returns one tensor of the weight."""
    check_tensor("x", x)
    if isinstance(weight, QuantizedWeight):
        held = check_quantized(weight).codes
    else:
        held = check_tensor("weight", weight)
        if weight.dim() != 2:
            raise shape_error("weight", weight, "[out, in]")
        check_frozen(weight=weight)
    out_features, in_features = weight.shape
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise shape_error("x", x, f"[..., in] with in = {in_features}")
    if bias is not None and (check_tensor("bias", bias).dim() != 1 or bias.shape[0] != out_features):
        raise shape_error("bias", bias, f"[{out_features}]")
    return held


@torch.compiler.assume_constant_result
def _has_autocast(kind: str) -> bool:
    """Not every kind of device has it. Before torch 2.12, torch.compile cannot trace the question."""
    return is_autocast_available(kind)


def under_autocast(x: Tensor) -> Tensor:
    """x, under autocast in autocast's dtype."""
    kind = x.device.type
    return x.to(get_autocast_dtype(kind)) if _has_autocast(kind) and torch.is_autocast_enabled(kind) else x


def as_ops_take(x: Tensor, weight: Tensor | QuantizedWeight) -> tuple[Tensor, str, list[Any]]:
    """Returns x (under autocast in autocast's dtype), the name of the op, and the weight as the op takes it."""
    if isinstance(weight, Tensor):
        return under_autocast(x), "linear", [weight]
    *parts, (out_features, in_features), blocksize = weight
    if x.shape[-1] != in_features:  # the op infers it from x
        raise shape_error("x", x, f"[..., in] with in = {in_features}")
    return under_autocast(x), "quantized_linear", [*parts, blocksize, out_features]


def _run(x: Tensor, compute: Callable[[], Tensor], check: Callable[[], None]) -> Tensor:
    """What `compute` returns. Checks take 26 us, half of what a small product does. So where our kernels compute, they
    are made after a kernel has refused its arguments, to say what is wrong."""
    if not torch.compiler.is_compiling():
        # An error comes again below, unless a check finds its reason. Checkpoints end by one of another kind.
        with suppress(RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            if has_kernels(x.device):
                return compute()
    check()
    return compute()


def _check_linear(x: Tensor, weight: Any, bias: Tensor | None, factors: Factors) -> None:
    held = check_operands(x, weight, bias)
    check_adapter(factors, *weight.shape)
    check_devices({"x": x, "weight": held, "bias": bias, **factors})


def linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    a0: Tensor | None = None,
    b0: Tensor | None = None,
    scaling: float = 1.0,
    implicit: bool = False,
    int8: bool = False,
) -> Tensor:
    """A linear layer with a low-rank adapter, fused: one read of the weight, dense or quantised, forward and backward.

    If a0 and b0 are given, a and b are differences from them: the factors are A = a0 + a and B = b0 + b. Otherwise a
    and b are the factors themselves, as in LoRA or QLoRA::

        no factors        y = x Wᵀ + bias
        implicit=False    y = x Wᵀ + scaling (x Aᵀ) Bᵀ + bias                     W lacks what the adapter starts from
        implicit=True     y = x Wᵀ + scaling ((x Aᵀ) bᵀ + (x aᵀ) b0ᵀ) + bias      W is whole: the change B A - b0 a0

    Differentiable in x, bias, a and b; the gradients are PiSSA's (arXiv 2404.02948, section 3). weight, a0 and b0 are
    frozen. Products accumulate in float32 and are rounded once, to y's dtype. With bfloat16 activations, the operands
    of products are rounded to bfloat16 where the processor multiplies that faster, as in mixed precision. Up to 16 rows
    of x are multiplied in another order than more rows, so a row's last digits may depend on the number of rows.

    With `int8`, the products with a quantised weight are products of integers where the processor multiplies these
    faster (`build_info()["int8"]`): x or the gradient of y, and the weight, are rounded to 8 bits in blocks of 64 to
    256 elements of the inner dimension. Each block of a row has a scale, by which its largest element becomes 127; on
    AVX2 without VNNI, a weight's becomes 63. For Gaussian operands the result errs by 1 % of its norm, in bfloat16 by
    0.2 %. Columns of x whose root mean square is more than five times the median column's, one in 64 at most, are
    multiplied as without it, because a scale for them leaves few digits of the others (LLM.int8(), arXiv 2208.07339).
    So are up to 16 rows of x, the adapter's part, and the gradients of a and b.

    On CUDA, with half-precision activations (float16 too), the factors and a quantised weight are rounded to their
    dtype. With more than 16 rows of x (64 with a quantised weight), the sum is rounded to it once more, after the
    adapter's part. All work is queued on the current stream without waiting: CUDA graphs can capture both directions.

    Args:
        x: [..., in], float32, bfloat16 or float16.
        weight: [out, in] in any of these dtypes, or `QuantizedWeight`.
        bias: [out], or None.
        a: [r, in], trained; used in float32; given with b.
        b: [out, r], likewise.
        a0: [r, in], frozen; used in float32; given with b0.
        b0: [out, r], likewise.
        scaling: lora_alpha / r; any finite number.
        implicit: if a0 and b0 are given, whether the weight is whole.
        int8: whether products with a quantised weight may be of integers. No effect on a dense weight, on a GPU, or
            where the processor does not multiply bytes.

    Returns:
        [..., out], in x's dtype, or under autocast in autocast's.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    check_change_scaling(scaling)
    factors = {"a": a, "b": b, "a0": a0, "b0": b0}

    def compute() -> Tensor:
        check_frozen(weight=weight, a0=a0, b0=b0)
        given, op, slots = as_ops_take(x, weight)
        last = (bias, *map(as_float32, factors.values()), float(scaling), implicit)
        return _autograd.product(op, given, slots, last, int8=int8 and isinstance(weight, QuantizedWeight))

    return _run(x, compute, lambda: _check_linear(x, weight, bias, factors))


def add_low_rank(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    a0: Tensor | None = None,
    b0: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """Adds the change of an adapter to `y`, which may be any function of x::

        with a0 and b0     y + scaling ((x (a0 + a)ᵀ) bᵀ + (x aᵀ) b0ᵀ)     PiSSA's change
        without            y + scaling (x aᵀ) bᵀ                           plain LoRA

    PiSSA's change is `scaling (B A - b0 a0) x`, with A = a0 + a and B = b0 + b, computed without cancellation. It is
    exactly 0 at a = b = 0, where the result has y's bits. Differentiable in y, x, a and b. The sum is computed in
    float32 and rounded once.

    Args:
        y: [..., out], float32, bfloat16 or float16.
        x: [..., in] in any of these dtypes, with y's leading dimensions.
        a: [r, in], trained; used in float32.
        b: [out, r], likewise.
        a0: [r, in], frozen; used in float32; given with b0.
        b0: [out, r], likewise.
        scaling: lora_alpha / r; any finite number.

    Returns:
        [..., out] in y's dtype.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    check_change_scaling(scaling)
    factors = {"a": a, "b": b, "a0": a0, "b0": b0}

    def compute() -> Tensor:
        check_frozen(a0=a0, b0=b0)
        return _autograd.run("add_low_rank", y, x, *map(as_float32, factors.values()), float(scaling), a0 is not None)

    return _run(x, compute, lambda: _check_low_rank(y, x, factors))


def _check_low_rank(y: Tensor, x: Tensor, factors: Factors) -> None:
    y, x = check_tensor("y", y), check_tensor("x", x)
    if y.dim() < 1 or x.dim() < 1 or y.shape[:-1] != x.shape[:-1]:
        raise shape_error("y", y, f"[..., out] with x's leading dimensions, {list(x.shape[:-1])}")
    check_adapter(factors, y.shape[-1], x.shape[-1])
    check_devices({"y": y, "x": x, **factors})
