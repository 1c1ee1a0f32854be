"""The ops against their formulas in float64, for `pissa selftest` and `pissa env`. Only torch is needed.

An op sums products of float32 numbers. A sum of k terms, in any order, is off by at most k u Σ|terms|, u = 2^-24: the
bound of an element is the formula on absolute values, times k u.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pissa import ops
from pissa.cli.findings import Check, Finding, close, same

_U = 2.0**-24
_FEW, _MANY = 4, 150
"""Rows of x: few are multiplied by other kernels than many."""
_TRAINED = ("x", "a", "b")
_SCALING = 0.5
_IN, _OUT = 392, 264

# The numbers between -1 and 1 that codes stand for, of each format: NF4 (arXiv 2305.14314, appendix E) and INT8.
_LEVELS = {
    "nf4": torch.tensor(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
         -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
         0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
        dtype=torch.float64,
    ),
    "int8": torch.arange(-127, 128, dtype=torch.float64) / 127,
}  # fmt: skip
# Half the largest step between the numbers that 8 bits of a quantised scale stand for: 64 of them from 0.1 to 1. They
# are looked up in a table of 2^16 places, as in bitsandbytes.
_NESTED = 0.9 / 128 + 2.0**-16


def op_checks(device: torch.device) -> dict[str, Check]:
    """All checks of the ops on a device, by name."""
    checks: dict[str, Check] = {}
    for dtype in (torch.float32, torch.bfloat16):
        checks[f"svd_lowrank, {_name(dtype)}"] = partial(_svd, dtype, device)
    for dtype in (torch.float32, torch.bfloat16):
        checks[f"split and residual, {_name(dtype)}"] = partial(_split, dtype, device)
    for format, known in ops.formats.FORMATS.items():
        for nested in (False, True) if known.has_double_quant else (False,):
            name = f"quantize and dequantize, {format}{' with double_quant' if nested else ''}"
            checks[name] = partial(_quantise, format, nested, device)
        checks[f"split with a residual in {format}"] = partial(_split_quantised, format, device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for form in ("dense", *ops.formats.FORMATS):
            name = f"linear, {form} weight, {_name(dtype)}"
            checks[name] = partial(linear_findings, form, dtype, device)
    for dtype in (torch.float32, torch.bfloat16):
        checks[f"add_low_rank, {_name(dtype)}"] = partial(_add_low_rank, dtype, device)
    if device.type == "cpu":
        checks["the same bits with 1 and 2 threads"] = _threads
    return checks


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- Decompositions --------------------------------------------------------------------------------------------------


def _power_law(rows: int, cols: int) -> Tensor:
    """A float64 matrix with singular values 1, 1/2, 1/3, ..."""
    generator = torch.Generator().manual_seed(0)
    k = min(rows, cols)
    u, v = (torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q for n in (rows, cols))
    weight: Tensor = (u / torch.arange(1, k + 1, dtype=torch.float64)) @ v.mT
    return weight


def _left(what: str, weight: Tensor, product: Tensor, r: int) -> Finding:
    """How much more of a weight, float64, a product of rank r leaves than the best one. A decomposition in float32 is
    that of a matrix which is this much away."""
    best = torch.linalg.svdvals(weight)[r:].norm()
    rounding = max(weight.shape) * 2 * _U * torch.linalg.matrix_norm(weight)
    return Finding(
        f"norm that {what} leaves, less the least", ((weight - product).norm() - best).item(), rounding.item()
    )


def _svd(dtype: torch.dtype, device: torch.device) -> Iterator[Finding]:
    weight, r = _power_law(130, 97).to(dtype), 12
    u, s, v = (tensor.cpu().double() for tensor in ops.svd_lowrank(weight.to(device), r))
    weight = weight.double()
    for name, factor in (("U", u), ("V", v)):
        # Orthogonalised in float32: a few u for each entry of the r x r matrix.
        error = (factor.mT @ factor - torch.eye(r, dtype=torch.float64)).norm().item()
        yield Finding(f"{name}: distance of its columns from orthonormal", error, 32 * _U * math.sqrt(r))
    exact = torch.linalg.svdvals(weight)
    rounding = 16 * _U * math.sqrt(max(weight.shape)) * exact[0]
    yield Finding("largest error of the singular values", (s - exact[:r]).abs().max().item(), rounding.item())
    yield _left("U S Vᵀ", weight, (u * s) @ v.mT, r)


def _split(dtype: torch.dtype, device: torch.device) -> Iterator[Finding]:
    weight, r, scaling = _power_law(97, 130).to(dtype), 12, 2.0
    split = ops.split(weight.to(device), r, scaling=scaling, form="explicit")
    assert isinstance(split.residual, Tensor)
    product, error = _product(weight, split, scaling)
    yield _left("the principal part", weight.double(), product, r)
    yield close("the residual", split.residual, weight.double() - product, error)


def _product(weight: Tensor, split: ops.Split, scaling: float) -> tuple[Tensor, Tensor]:
    """The principal part of a weight, and the bound of the residual's error in float32."""
    a0, b0 = split.a0.cpu().double(), split.b0.cpu().double()
    sizes = weight.double().abs() + scaling * b0.abs() @ a0.abs()
    return scaling * b0 @ a0, (len(a0) + 4) * _U * sizes


# ---- Quantised weights -----------------------------------------------------------------------------------------------


def _quantise(format: str, nested: bool, device: torch.device) -> Iterator[Finding]:
    # An odd number of elements, and blocks that cross rows.
    weight = torch.randn(97, 131, generator=torch.Generator().manual_seed(0))
    found = ops.quantize(weight.to(device), format, double_quant=nested)
    yield _nearest("the weight", found, weight.double(), torch.zeros_like(weight))
    exact = ops.dequantize(found).cpu().double()
    for dtype in (torch.bfloat16, torch.float16):
        yield close(f"the weight in {_name(dtype)}", ops.dequantize(found, dtype), exact, torch.zeros_like(exact))


def _split_quantised(format: str, device: torch.device) -> Iterator[Finding]:
    weight, r, scaling = _power_law(97, 130).float(), 12, 2.0
    # Without the error of quantised scales, which would hide others.
    split = ops.split(weight.to(device), r, scaling=scaling, form=format, double_quant=False)
    assert isinstance(split.residual, ops.QuantizedWeight)
    product, error = _product(weight, split, scaling)
    yield _left("the principal part", weight.double(), product, r)
    yield _nearest("the residual", split.residual, weight.double() - product, error)


def _nearest(what: str, found: ops.QuantizedWeight, exact: Tensor, error: Tensor) -> Finding:
    """Each element of a quantised weight is the level nearest to the exact one, times the largest of its block.

    Args:
        exact: what has been quantised.
        error: its own error.
    """
    levels = _LEVELS[found.format]
    blocks, errors = (_in_blocks(tensor, found.blocksize) for tensor in (exact, error))
    scales = blocks.abs().amax(dim=1, keepdim=True)
    nearest = levels[torch.bucketize(blocks / scales, (levels[1:] + levels[:-1]) / 2)]
    distance = (nearest * scales - blocks).abs()
    # The scale is off as the largest element may be, the element itself as well; the quotient, the product and a level
    # in float32 are rounded.
    allowed = distance + 2 * errors.amax(dim=1, keepdim=True) + 8 * _U * scales
    if found.nested:
        allowed = allowed + (_NESTED + 4 * _U) * (scales - scales.mean()).abs().max()
    allowed = allowed.flatten()[: exact.numel()].view(exact.shape)
    return close(what, ops.dequantize(found), exact, allowed)


def _in_blocks(tensor: Tensor, size: int) -> Tensor:
    """[blocks, size], filled up with zeros."""
    flat = tensor.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


# ---- Products --------------------------------------------------------------------------------------------------------


def _unit_error(terms: int, dtype: torch.dtype, device: torch.device) -> float:
    """Of sums of so many terms in float32. With activations in half precision factors are rounded to their dtype, and
    products between two factors: thrice on the CPU, in bfloat16 only; on CUDA the output may be twice more."""
    half = torch.finfo(dtype).eps / 2
    if dtype == torch.float32 or (device.type == "cpu" and dtype == torch.float16):
        return terms * _U
    return terms * _U + (3.03 if device.type == "cpu" else 5.05) * half


def _tensors(tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A linear layer with an adapter of rank 8, its input, and the gradient dy."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (tokens, _IN), "weight": (_OUT, _IN), "bias": (_OUT,), "a": (8, _IN), "b": (_OUT, 8)}
    shapes |= {"a0": (8, _IN), "b0": (_OUT, 8), "y": (tokens, _OUT), "dy": (tokens, _OUT)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, terms in {"weight": _IN, "a": _IN, "a0": _IN, "b": 8, "b0": 8}.items():
        made[name] /= math.sqrt(terms)  # no part of the sum is lost among the roundings of another
    return made | {name: made[name].to(dtype) for name in ("x", "dy", "weight", "y")}


def linear_findings(form: str, dtype: torch.dtype, device: torch.device) -> Iterator[Finding]:
    """Errors of the fused linear layer, forward and backward.

    Args:
        form: of the weight, "dense" or a format.
        dtype: of the activations, and of a dense weight.
    """
    for tokens in (_FEW, _MANY):
        given = _tensors(tokens, dtype)
        del given["y"]
        weight: Any = given["weight"].to(device)
        if form != "dense":
            weight = ops.quantize(weight.float(), form)
            given["weight"] = ops.dequantize(weight).cpu()

        def op(weight: Tensor, *, kept: Any = weight, **tensors: Any) -> Tensor:
            return ops.linear(tensors.pop("x"), kept, **tensors, scaling=_SCALING)

        yield from _forward_and_backward(op, _linear64, given, dtype, device)


def _linear64(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> Tensor:
    return x @ (weight + _SCALING * (b0 + b) @ (a0 + a)).mT + bias


def _add_low_rank(dtype: torch.dtype, device: torch.device) -> Iterator[Finding]:
    for tokens in (_FEW, _MANY):
        given = _tensors(tokens, dtype)
        del given["weight"], given["bias"]
        op = partial(ops.add_low_rank, scaling=_SCALING)
        yield from _forward_and_backward(op, _add_low_rank64, given, dtype, device)


def _add_low_rank64(y: Tensor, x: Tensor, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> Tensor:
    return y + _SCALING * x @ (b @ (a0 + a) + b0 @ a).mT


def _forward_and_backward(
    op: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    given: dict[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Finding]:
    """The output of an op and its gradients of x, a and b, for tensors by name and for dy."""
    unit = _unit_error(max(_IN, _OUT, _MANY) + 16, dtype, device)  # the longest sum, and the few operations around
    got = _values(op, {name: tensor.to(device) for name, tensor in given.items()})
    exact = _values(formula, {name: tensor.double() for name, tensor in given.items()})
    sizes = _values(formula, {name: tensor.double().abs() for name, tensor in given.items()})
    names = ("y", *(f"the gradient of {name}" for name in _TRAINED))
    for name, value, wanted, size in zip(names, got, exact, sizes, strict=True):
        yield close(f"{name} ({len(given['x'])} rows)", value, wanted, unit * size)


def _values(function: Callable[..., Tensor], given: dict[str, Tensor]) -> list[Tensor]:
    tensors = {name: tensor.detach().requires_grad_(name in _TRAINED) for name, tensor in given.items()}
    dy = tensors.pop("dy")
    y = function(**tensors)
    return [y.detach(), *torch.autograd.grad(y, [tensors[name] for name in _TRAINED], dy)]


def _threads() -> Iterator[Finding]:
    """Large enough for two threads, and for sums that are cut if threads cut them."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 520, generator=generator) for rows in (300, 200))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            split = ops.split(weight, 16, form="nf4")
            assert isinstance(split.residual, ops.QuantizedWeight)
            found.append((split.a0, split.residual.codes, ops.linear(x, split.residual, a=split.a0, b=split.b0)))
    finally:
        torch.set_num_threads(before)
    for name, one, two in zip(("a0", "the codes", "y"), *found, strict=True):
        yield same(name, two, one)
