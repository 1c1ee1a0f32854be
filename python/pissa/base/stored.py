"""Base layers that store a residual Q = W - s B0 A0: base(x) = x Q^T + s (x A0^T) B0^T + b."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pissa import ops
from pissa.base.codes import HoldsNf4
from pissa.base.keeps_dtype import KeepsDtype
from pissa.config import Form
from pissa.ops.checks import FLOATS, Passes


class Origin(NamedTuple):
    """What determines start factors, given the base: adapters that agree on it share them."""

    r: int
    scaling: float
    svd: str
    svd_passes: Passes
    seed: int
    init: str
    adalora: bool


class Deltas(NamedTuple):
    """What is trained: the differences from the start factors."""

    a: Tensor
    """[r, in]"""
    b: Tensor
    """[out, r]"""
    e: Tensor | None = None
    """[r, 1], of the singular values, with AdaLoRA."""


class StartFactors(KeepsDtype):
    """The frozen factors an adapter starts from: a0 float32 [r, in], b0 float32 [out, r].

    With AdaLoRA (arXiv 2303.10512; PiSSA's appendix A) a0 = E0 V0 has singular values for the lengths of its rows.
    """

    a0: Tensor
    b0: Tensor

    def __init__(self, a0: Tensor, b0: Tensor, origin: Origin) -> None:
        super().__init__()
        self.register_buffer("a0", a0.contiguous())
        self.register_buffer("b0", b0.contiguous())
        self.origin = origin

    def change(self, deltas: Deltas) -> tuple[Tensor, Tensor]:
        """The differences dA, dB of the two factors. With AdaLoRA A = (E0 + dE) (V0 + dV), and deltas.a is dV."""
        if deltas.e is None:
            return deltas.a, deltas.b
        values, vectors = self.values_and_vectors()
        return (values + deltas.e) * deltas.a + deltas.e * vectors, deltas.b

    def factors_of_change(self, deltas: Deltas) -> tuple[Tensor, Tensor]:
        """[A ; dA] [2r, in] and [dB | B0] [out, 2r], float32: their product is B A - B0 A0, without cancellation."""
        da, db = (delta.float() for delta in self.change(deltas))
        return torch.cat([self.a0 + da, da]), torch.cat([db, self.b0], dim=1)

    def values_and_vectors(self) -> tuple[Tensor, Tensor]:
        """E0 [r, 1] and V0 [r, in]: the lengths and the directions of a0's rows."""
        values = self.a0.norm(dim=1, keepdim=True)
        return values, self.a0 / values.where(values > 0, 1)

    def extra_repr(self) -> str:
        return f"in={self.a0.shape[1]}, r={self.a0.shape[0]}, out={self.b0.shape[0]}"


class Replaced(NamedTuple):
    """What a stored base remembers of the layer in whose place it is."""

    kind: type[nn.Module]
    """nn.Linear or transformers' Conv1D: what a dense layer in its place is."""
    dtype: torch.dtype
    """Of the dense weight."""
    bias: nn.Parameter | None
    """Used as it is."""
    fingerprint: str
    """Of the dense weight."""


class StoredLinear(KeepsDtype, ABC):
    """A linear layer kept as a residual plus its principal part: the base of a layer without its W.

    Args:
        replaced: what is known of the layer in whose place this one is.
        start: the factors that the residual lacks. They belong to the base, whatever becomes of the adapter.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, replaced: Replaced, start: StartFactors) -> None:
        super().__init__()
        self.in_features, self.out_features = start.a0.shape[1], start.b0.shape[0]
        self.kind, self.dtype, self.bias, self.fingerprint = replaced
        self.start = start
        self.scaling = start.origin.scaling

    @property
    @abstractmethod
    def form(self) -> Form:
        """How the residual is stored."""

    @property
    @abstractmethod
    def residual(self) -> Tensor | ops.QuantizedWeight:
        """Q, as pissa.ops takes it."""

    @abstractmethod
    def dense_residual(self) -> Tensor:
        """Q in float32 [out, in]."""

    def dense(self) -> Tensor:
        """The weight of the base function, Q + s B0 A0, in float32 [out, in]."""
        return torch.addmm(self.dense_residual(), self.start.b0, self.start.a0, alpha=self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """The output without the bias."""
        return self._product(x, None)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return ops.linear(x, self.residual, bias, a=self.start.a0, b=self.start.b0, scaling=self.scaling)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class ResidualLinear(StoredLinear):
    """The paper's explicit form: the residual as a dense weight in the base's dtype."""

    def __init__(self, replaced: Replaced, residual: Tensor, start: StartFactors) -> None:
        super().__init__(replaced, start)
        self.weight = nn.Parameter(residual, requires_grad=False)

    @property
    def form(self) -> Form:
        return Form("explicit")

    @property
    def residual(self) -> Tensor:
        return self.weight.detach()  # FSDP's views of its flat parameter ask for a gradient where any part of it does

    def dense_residual(self) -> Tensor:
        return self.residual.float()


class Nf4Linear(HoldsNf4, StoredLinear):
    """QPiSSA's form: the residual in 4 bits, in bitsandbytes' bytes."""

    def __init__(
        self, replaced: Replaced, residual: ops.QuantizedWeight, start: StartFactors, quant_storage: torch.dtype
    ) -> None:
        super().__init__(replaced, start)
        self.hold(residual, quant_storage)

    @property
    def form(self) -> Form:
        return Form("nf4", self.blocksize, self.double_quant)

    @property
    def residual(self) -> ops.QuantizedWeight:
        return self.nf4

    def dense_residual(self) -> Tensor:
        return ops.dequantize(self.nf4)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, blocksize={self.blocksize}, double_quant={self.double_quant}"


Expected = tuple[tuple[int, ...], tuple[torch.dtype, ...]]
"""The shape of a tensor in a file, and the dtypes that it may have."""


def residual_shapes(form: Form, matrix_shape: tuple[int, int]) -> dict[str, Expected]:
    """The tensors that a residual of that form is kept in, by name."""
    if form.kind not in ops.formats.FORMATS:
        return {"residual": (matrix_shape, FLOATS)}
    format = ops.formats.FORMATS[form.kind]
    options = format.options(form.blocksize, form.double_quant, matrix_shape[1])
    return {name: (shape, (dtype,)) for name, (shape, dtype) in format.tensors(matrix_shape, *options).items()}


def residual_tensors(residual: Tensor | ops.QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that a residual is kept in, named as in `residual_shapes`. Its fingerprint is theirs, in order."""
    if isinstance(residual, Tensor):
        return {"residual": residual.detach()}
    return {name: part.detach() for name, part in residual.tensors().items()}


def residual_from(
    tensors: Mapping[str, Tensor], form: Form, matrix_shape: tuple[int, int]
) -> Tensor | ops.QuantizedWeight:
    """The way back from `residual_tensors`."""
    if form.kind not in ops.formats.FORMATS:
        return tensors["residual"]
    blocksize, _ = ops.formats.FORMATS[form.kind].options(form.blocksize, form.double_quant, matrix_shape[1])
    nested, offset = tensors.get("nested_absmax"), tensors.get("offset")
    return ops.QuantizedWeight(tensors["codes"], tensors["absmax"], nested, offset, form.kind, matrix_shape, blocksize)


def stored_linear(
    replaced: Replaced, residual: Tensor | ops.QuantizedWeight, start: StartFactors, quant_storage: torch.dtype
) -> StoredLinear:
    """The base layer that keeps `residual`, of which `start` holds the rest; `quant_storage` is for codes."""
    if isinstance(residual, Tensor):
        return ResidualLinear(replaced, residual, start)
    return Nf4Linear(replaced, residual, start, quant_storage)
