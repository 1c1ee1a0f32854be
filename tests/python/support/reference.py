"""Plain float64 formulas that the tests compare with, and the error bounds that come with them."""

from __future__ import annotations

import torch
from torch import Tensor

import devices
from pissa.ops._load import FORCED

EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # unit roundoff


def unit_errors(k: int, activations: torch.dtype) -> float:
    """Of sums of k terms in float32; with bfloat16 activations of both factors, and between them, as well. On CUDA that
    goes for float16 too, and an output in half precision may be rounded twice more (cpp/pissa/cuda/backend.h), as it is
    by PyTorch's operations (ops/composite.py)."""
    sums = k * EPS[torch.float32]
    if devices.on_cpu() and not FORCED:
        return sums + (3.03 * EPS[torch.bfloat16] if activations == torch.bfloat16 else 0.0)
    return sums + (0.0 if activations == torch.float32 else 5.05 * EPS[activations])


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    a0: Tensor | None = None,
    b0: Tensor | None = None,
    scaling: float = 1.0,
    implicit: bool = False,
) -> Tensor:
    """`pissa.ops.linear`, term by term, on float64 tensors."""
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    if a is None or b is None:
        return y
    if a0 is None or b0 is None:
        return y + scaling * (x @ a.T) @ b.T
    if implicit:
        return y + scaling * ((x @ (a0 + a).T) @ b.T + (x @ a.T) @ b0.T)
    return y + scaling * (x @ (a0 + a).T) @ (b0 + b).T


def assert_close(got: Tensor, expected: Tensor, bound: Tensor, what: str) -> None:
    """|got - expected| <= bound + half an ulp of got's dtype, elementwise; prints the worst element."""
    got = devices.fetch(got)
    error = (got.double() - expected).abs()
    format = torch.finfo(got.dtype)
    limit = bound + EPS[got.dtype] * expected.abs() + format.smallest_normal * format.eps / 2  # among subnormals
    excess = (error / limit).max().item() if error.numel() else 0.0
    assert got.isfinite().all(), f"{what}: not finite"
    assert excess <= 1.0, f"{what}: error is {excess:.2f} times its bound (largest error {error.max().item():.3e})"


def power_law(rows: int, cols: int, exponent: float, seed: int = 0) -> Tensor:
    """A float64 matrix with singular values 1, 2^-exponent, 3^-exponent, ... and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    k = min(rows, cols)
    u, _ = torch.linalg.qr(torch.randn(rows, k, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(cols, k, generator=generator, dtype=torch.float64))
    return (u * torch.arange(1, k + 1, dtype=torch.float64) ** -exponent) @ v.T


def energy_loss(weight: Tensor, v: Tensor) -> float:
    """1 - ‖W V‖² / (sum of the leading r squared singular values), V [in, r] made exactly orthonormal first."""
    w = devices.fetch(weight).double()
    q, _ = torch.linalg.qr(devices.fetch(v).double())
    return 1.0 - ((w @ q).square().sum() / torch.linalg.svdvals(w)[: v.shape[1]].square().sum()).item()
