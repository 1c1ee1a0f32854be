"""A change of a weight, rounded into its codes: `merge_codes`."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pissa.ops._linear import linear
from pissa.ops._quant import QuantizedWeight, check_quantized
from pissa.ops._second_moment import check_moments, feedback_factors
from pissa.ops.checks import check_change_scaling, check_choice, check_devices, check_factors, check_seed

_OPS = torch.ops.pissa


class Merged(NamedTuple):
    """Codes after a change, and sums over its elements that say what became of it. Sums of several weights may be
    added."""

    weight: QuantizedWeight
    """The new codes, with the scales of the old ones."""
    change: float
    """The sum of the squares of the change D."""
    along: float
    """The sum of D times the change of the codes' elements."""
    square: float
    """The sum of the squares of the change of the codes' elements."""
    moved: int
    """The number of elements with another code."""
    beyond: int
    """The number of elements whose change leads beyond the first or the last level of their block."""


def merge_codes(
    weight: QuantizedWeight,
    a: Tensor,
    b: Tensor,
    scaling: float = 1.0,
    *,
    rounding: str = "dither",
    second_moment: Tensor | None = None,
    seed: int = 0,
) -> Merged:
    """Adds the change scaling * b @ a to a quantised weight. The scales stay, and nothing else is stored.

    Codes lie on the levels of their format. Rounding the sum to the nearest level loses a change that is small beside
    the distance of two levels. "dither" goes to the next level in the direction of the change, with the ratio of the
    change to the distance as the probability: stochastic rounding (Croci et al. 2022, doi:10.1098/rsos.211631) of the
    change. Within the levels the expected sum is exact. An element's threshold follows from the seed and the element's
    position alone, so the result does not depend on threads, and the same change gives the same codes. An element whose
    scale is zero or not finite stays, as does one whose change is NaN.

    Args:
        weight: the codes and scales of a matrix [out, in], of any format that is read.
        a: [r, in], float32, bfloat16 or float16.
        b: [out, r], of the same dtypes.
        scaling: finite.
        rounding: "dither" or "nearest".
        second_moment: E[xᵀx] of the layer's inputs x, float32 [in, in], as `split_many` takes them. What the codes of a
            column lack of its change is then added to the columns that are rounded after it, so that the outputs lose
            less (error feedback, `ops._second_moment`). NaN in a change reaches these columns too.
        seed: from 0 to 2**63 - 1. Different weights need different seeds.

    Raises:
        TypeError, ValueError: an argument, or a part of the weight, is invalid; the message names it.
    """
    check_quantized(weight)
    check_choice("rounding", rounding, ("dither", "nearest"))
    check_change_scaling(scaling)
    check_factors("a", a, "b", b, *weight.shape)
    check_devices({"weight.codes": weight.codes, "a": a, "b": b})
    check_seed(seed)
    a, b = a.detach(), b.detach()
    lower = None if second_moment is None else feedback_factors(check_moments([second_moment], [a], ["weight"]))[0]
    merged, (along, square, moved, beyond) = unchecked_merge(weight, a, b, scaling, rounding == "dither", seed, lower)
    # D is nowhere as a whole.
    change = scaling**2 * float((b.double().mT @ b.double()).mul_(a.double() @ a.double().mT).sum())
    return Merged(merged, change, along, square, int(moved), int(beyond))


def unchecked_merge(
    weight: QuantizedWeight, a: Tensor, b: Tensor, scaling: float, dither: bool, seed: int, lower: Tensor | None = None
) -> tuple[QuantizedWeight, list[float]]:
    """Returns the merged weight, and `along`, `square`, `moved` and `beyond` of `Merged`. Compiled for CPUs only. With
    `lower`, from `feedback_factors`, by error feedback."""
    used = b.any(dim=0)  # half of LoRA's are zeros
    if not used.any():
        return weight, [0.0] * 4
    parts = [None if part is None else part.cpu() for part in weight[:4]]
    change = a[used].cpu(), b[:, used].cpu(), scaling, None if lower is None else lower.cpu()
    codes, sums = _OPS.merge_codes(*parts, weight.format, weight.blocksize, *change, dither, seed)
    return weight._replace(codes=codes.to(weight.device)), sums.tolist()


def linear_through(
    x: Tensor, merged: QuantizedWeight, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """The linear layer with weight M in codes, which `merge_codes` has made of a weight W and the change scaling * b @
    a: y = x Mᵀ + bias. Gradients pass as if nothing had been rounded: that of x is through M, those of a and b are
    those of the change.

    Args:
        x: [..., in], float32, bfloat16 or float16.
        merged: the codes and scales of M [out, in].
        bias: [out], or None.
        a, b, scaling: as in `merge_codes`.

    Raises:
        TypeError, ValueError: as for `linear`.
    """
    return cast(Tensor, _AsIfAdded.apply(linear(x, merged, bias), x, a, b, scaling))  # type: ignore[no-untyped-call, unused-ignore]


class _AsIfAdded(torch.autograd.Function):
    """Gives a and b the gradients of y + scaling * x aᵀ bᵀ, and returns y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.scaling = scaling
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, a, b = ctx.saved_tensors
        rows, outputs = x.flatten(0, -2), dy.flatten(0, -2)
        grad_a = (outputs @ b.to(dy.dtype)).mT @ rows
        grad_b = outputs.mT @ (rows @ a.to(x.dtype).mT)
        return dy, None, (ctx.scaling * grad_a).to(a.dtype), (ctx.scaling * grad_b).to(b.dtype), None
