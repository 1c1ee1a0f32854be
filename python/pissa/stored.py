"""Base layers that store a residual Q = W - s B0 A0: base(x) = x Q^T + s (x A0^T) B0^T + b."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pissa import ops
from pissa.config import Form


class _KeepsDtype(nn.Module):
    """A module whose buffers follow it to another device but never to another dtype.

    Start factors and quantisation scales define the base function; `model.half()` must not round them.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class Origin(NamedTuple):
    """What determines start factors, given the base: adapters that agree on it share them."""

    r: int
    scaling: float
    svd: str
    svd_passes: int
    seed: int


class StartFactors(_KeepsDtype):
    """The frozen factors an adapter starts from: a0 float32 [r, in], b0 float32 [out, r]."""

    a0: Tensor
    b0: Tensor

    def __init__(self, a0: Tensor, b0: Tensor, origin: Origin) -> None:
        super().__init__()
        self.register_buffer("a0", a0.contiguous())
        self.register_buffer("b0", b0.contiguous())
        self.origin = origin

    def extra_repr(self) -> str:
        return f"in={self.a0.shape[1]}, r={self.a0.shape[0]}, out={self.b0.shape[0]}"


class StoredLinear(_KeepsDtype, ABC):
    """A linear layer kept as a residual plus its principal part: the base of a layer without its W.

    Args:
        linear: the dense layer; its bias is used as it is, its weight is not kept.
        start: the factors that the residual lacks. They belong to the base, whatever becomes of the adapter.
        fingerprint: fingerprint of the dense weight.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, start: StartFactors, fingerprint: str) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.dtype = linear.weight.dtype
        self.bias = linear.bias
        self.start = start
        self.scaling = start.origin.scaling
        self.fingerprint = fingerprint
        self.train(linear.training)

    @property
    @abstractmethod
    def form(self) -> Form:
        """How the residual is stored."""

    @property
    @abstractmethod
    def residual(self) -> Tensor | ops.Nf4Weight:
        """Q, as pissa.ops takes it."""

    @abstractmethod
    def dense_residual(self) -> Tensor:
        """Q in float32 [out, in]."""

    def dense(self) -> Tensor:
        """The weight of the base function, Q + s B0 A0, in float32 [out, in]."""
        return torch.addmm(self.dense_residual(), self.start.b0, self.start.a0, alpha=self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(
            x, self.residual, self.bias, delta_a=self.start.a0, delta_b=self.start.b0, scaling=self.scaling
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class ResidualLinear(StoredLinear):
    """The paper's explicit form: the residual as a dense weight in the base's dtype."""

    def __init__(self, linear: nn.Linear, residual: Tensor, start: StartFactors, fingerprint: str) -> None:
        super().__init__(linear, start, fingerprint)
        self.weight = nn.Parameter(residual, requires_grad=False)

    @property
    def form(self) -> Form:
        return Form("explicit")

    @property
    def residual(self) -> Tensor:
        return self.weight

    def dense_residual(self) -> Tensor:
        return self.weight.detach().float()


class Nf4Linear(StoredLinear):
    """QPiSSA's form: the residual in 4 bits, in bitsandbytes' bytes.

    `weight` holds the packed codes, frozen: uint8, two weights a byte, high nibble first. The scales are
    buffers.
    """

    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None

    def __init__(self, linear: nn.Linear, residual: ops.Nf4Weight, start: StartFactors, fingerprint: str) -> None:
        super().__init__(linear, start, fingerprint)
        self.blocksize = residual.blocksize
        self.weight = nn.Parameter(residual.codes, requires_grad=False)
        self.register_buffer("absmax", residual.absmax)
        self.register_buffer("nested_absmax", residual.nested_absmax)
        self.register_buffer("offset", residual.offset)

    @property
    def form(self) -> Form:
        return Form("nf4", self.blocksize, self.nested_absmax is not None)

    @property
    def residual(self) -> ops.Nf4Weight:
        shape = (self.out_features, self.in_features)
        return ops.Nf4Weight(self.weight, self.absmax, self.nested_absmax, self.offset, shape, self.blocksize)

    def dense_residual(self) -> Tensor:
        return ops.nf4_dequantize(self.residual)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, blocksize={self.blocksize}, double_quant={self.form.double_quant}"


def stored_linear(
    linear: nn.Linear, residual: Tensor | ops.Nf4Weight, start: StartFactors, fingerprint: str
) -> StoredLinear:
    """The base layer that keeps `linear` as `residual` and `start`."""
    if isinstance(residual, Tensor):
        return ResidualLinear(linear, residual, start, fingerprint)
    return Nf4Linear(linear, residual, start, fingerprint)
