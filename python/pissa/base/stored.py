"""Stored bases: a layer keeps a residual Q = W - s B0 A0 instead of W; base(x) = x Qᵀ + s (x A0ᵀ) B0ᵀ + b."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pissa import ops
from pissa.base.protocol import Operand
from pissa.base.start import StartFactors
from pissa.base.weights import HoldsCodes, OwnBase
from pissa.config import Form
from pissa.ops._quant import check_offset
from pissa.ops.checks import FLOATS, check_product
from pissa.ops.formats import FORMATS


class StoredLinear(OwnBase):
    """A linear base that keeps a residual and the start factors that the residual lacks. These belong to the base,
    whatever happens to the adapter. The bias is used as it is. The code that puts this base into a module's place sets
    `dense_type`, and the `dtype` and `fingerprint` of the dense weight."""

    start: StartFactors
    dtype: torch.dtype

    def __init__(self, start: StartFactors, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features = start.a0.shape[1], start.b0.shape[0]
        self.bias, self.start = bias, start
        self.scaling = start.origin.scaling

    @property
    @abstractmethod
    def residual(self) -> Tensor | ops.QuantizedWeight:
        """Q, as pissa.ops takes it."""

    def dense_residual(self) -> Tensor:
        """Q in float32 [out, in]."""
        residual = self.residual
        return residual.float() if isinstance(residual, Tensor) else ops.dequantize(residual)

    def matrix(self) -> Tensor:
        """The weight of the base function, Q + s B0 A0, in float32 [out, in]."""
        return torch.addmm(self.dense_residual(), self.start.b0, self.start.a0, alpha=self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output, with the given bias or without one."""
        return ops.linear(x, self.residual, bias, a=self.start.a0, b=self.start.b0, scaling=self.scaling)

    def operand_for(self, start: StartFactors, scaling: float, x: Tensor) -> Operand | None:
        """The residual, for an adapter that starts from what it lacks. (PEFT's set_scale may change a scaling.)"""
        return Operand(self.residual, False) if start is self.start and scaling == self.scaling else None

    def restore_module(self) -> nn.Module:
        """A dense module that computes the base function."""
        return self.dense_module(self.matrix().to(self.dtype))


class ResidualLinear(StoredLinear):
    """The paper's explicit form: the residual as a dense weight in the base's dtype."""

    def __init__(self, residual: Tensor, start: StartFactors, bias: nn.Parameter | None) -> None:
        super().__init__(start, bias)
        self.weight = nn.Parameter(residual, requires_grad=False)

    @property
    def form(self) -> Form:
        return Form("explicit")

    @property
    def residual(self) -> Tensor:
        return self.weight.detach()  # FSDP's views of its flat parameter require a gradient if any part of it does


class QuantizedLinear(HoldsCodes, StoredLinear):
    """QPiSSA's form: the residual quantised, in bitsandbytes' bytes."""

    def __init__(
        self, residual: ops.QuantizedWeight, start: StartFactors, bias: nn.Parameter | None, quant_storage: torch.dtype
    ) -> None:
        super().__init__(start, bias)
        self.store_codes(residual, quant_storage)

    @property
    def form(self) -> Form:
        return Form.quantised(self.format, self.double_quant)

    @property
    def residual(self) -> ops.QuantizedWeight:
        return self.quantized

    def extra_repr(self) -> str:
        options = (f"{name}={value}" for name, value in self.form.options().items() if value is not None)
        return ", ".join((super().extra_repr(), *options))


def stored_linear(
    residual: Tensor | ops.QuantizedWeight,
    start: StartFactors,
    bias: nn.Parameter | None = None,
    quant_storage: torch.dtype = torch.uint8,
) -> StoredLinear:
    """The base that keeps `residual`, which lacks `start`. `quant_storage` is the storage dtype of codes."""
    if isinstance(residual, Tensor):
        return ResidualLinear(residual, start, bias)
    return QuantizedLinear(residual, start, bias, quant_storage)


def residuals_of(
    weights: Sequence[Tensor],
    starts: Sequence[StartFactors],
    form: Form,
    names: Sequence[str],
) -> list[Tensor | ops.QuantizedWeight]:
    """The residuals, in that form, of the named layers' weights [out, in], without the factors that the starts take out
    of them. The host waits for a GPU once.

    Raises:
        ValueError: a layer's weight or factors are not finite. The message names the layer.
    """
    removed = [start.removed for start in starts]
    return ops.residual_many(
        weights,
        [a.to(weight.device) for weight, (a, _) in zip(weights, removed, strict=True)],
        [b.to(weight.device) for weight, (_, b) in zip(weights, removed, strict=True)],
        [start.origin.scaling for start in starts],
        names=[f"layer {name}: weight" for name in names],
        **form.options(),
    )


class ResidualCheck:
    """Checks, before residuals in that form are made, that `residuals_of` will not fail. Only `check` waits for a GPU,
    once for each device."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._layers: dict[torch.device, list[tuple[str, float, int, Tensor]]] = {}

    def add(self, name: str, weight: Tensor, start: StartFactors) -> None:
        """Adds a layer: its name, its weight [out, in] and the start that its residual will lack. Raises ValueError if
        rows of the weight are not a multiple of a block that must divide them."""
        if self._form.name in FORMATS:
            try:
                FORMATS[self._form.name].options(None, self._form.double_quant, weight.shape[1])
            except ValueError as error:
                raise ValueError(f"{name}: {error}: leave the layer out, or take another format") from error
        norms = [torch.linalg.vector_norm(factor, dtype=torch.float64) for factor in start.removed]
        largest = torch.stack(weight.detach().aminmax()).abs().amax().double()
        layer = (name, start.origin.scaling, weight.numel(), torch.stack([largest, *norms]))
        self._layers.setdefault(weight.device, []).append(layer)

    def check(self) -> None:
        """Raises ValueError, naming the layer, if weight or factors are not finite, or the residual may not be."""
        for layers in self._layers.values():
            sizes = torch.stack([size for *_, size in layers]).tolist()
            for (name, scaling, elements, _), (largest, norm_a, norm_b) in zip(layers, sizes, strict=True):
                names = (f"layer {name}: weight", f"layer {name}: a0", "b0")
                check_product(names, largest, norm_a, norm_b, scaling)
                if not self._form.double_quant:
                    continue
                # No scale exceeds the largest element. Half of float32's range leaves room for roundings of the sum.
                blocks = math.ceil(elements / FORMATS[self._form.name].usual_blocksize)
                sum_of_scales = (largest + scaling * norm_a * norm_b) * blocks
                if sum_of_scales >= torch.finfo(torch.float32).max / 2:
                    check_offset(math.inf, names[0])


Expected = tuple[tuple[int, ...], tuple[torch.dtype, ...]]
"""The shape of a tensor in a file, and the dtypes that it may have."""


def residual_shapes(form: Form, matrix_shape: tuple[int, int]) -> dict[str, Expected]:
    """The tensors in which a residual of that form is stored, by name."""
    if form.name not in FORMATS:
        return {"residual": (matrix_shape, FLOATS)}
    format = FORMATS[form.name]
    options = format.options(None, form.double_quant, matrix_shape[1])
    return {name: (shape, (dtype,)) for name, (shape, dtype) in format.tensors(matrix_shape, *options).items()}


def residual_tensors(residual: Tensor | ops.QuantizedWeight) -> dict[str, Tensor]:
    """The tensors in which a residual is stored, named as in `residual_shapes`. Its fingerprint is theirs, in order."""
    if isinstance(residual, Tensor):
        return {"residual": residual.detach()}
    return {name: part.detach() for name, part in residual.tensors().items()}


def residual_from(
    tensors: Mapping[str, Tensor], form: Form, matrix_shape: tuple[int, int]
) -> Tensor | ops.QuantizedWeight:
    """The inverse of `residual_tensors`."""
    if form.name not in FORMATS:
        return tensors["residual"]
    blocksize, _ = FORMATS[form.name].options(None, form.double_quant, matrix_shape[1])
    nested, offset = tensors.get("nested_absmax"), tensors.get("offset")
    return ops.QuantizedWeight(tensors["codes"], tensors["absmax"], nested, offset, form.name, matrix_shape, blocksize)
