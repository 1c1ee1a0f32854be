"""An adapted layer by its definition, in float64 on the CPU: W + s ((B0 + dB) (A0 + dA) - B0 A0), with W the matrix of
the base function. Tests of layers compare with it, whatever kind the layer is and in whatever form its base is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from devices import fetch, put
from language_models import error
from pissa import ops
from pissa.base.start import StartFactors
from pissa.base.stored import QuantizedLinear, StoredLinear
from pissa.layers.layer import PissaLayer, pissa_layers
from reference import EPS


def change_a_little(layer: PissaLayer, adapter: str = "default", size: float = 0.05, seed: int = 3) -> None:
    """Gives the adapter other factors, as training does."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.factor_parameters(adapter):
        parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))


def change_all(model: nn.Module, size: float = 0.05) -> None:
    """The same for every layer of a wrapped model."""
    for seed, layer in enumerate(pissa_layers(model.base_model.model, "default").values()):
        change_a_little(layer, size=size, seed=seed)


def base64(layer: PissaLayer) -> Tensor:
    """The matrix [out, in] of a linear layer's base function, from the parts that are kept."""
    base = layer.base.module
    if not isinstance(base, StoredLinear):
        return fetch(base.weight.detach()).double()
    kept = ops.dequantize(base.residual) if isinstance(base, QuantizedLinear) else base.weight.detach()
    a0, b0 = (fetch(factor).double() for factor in (base.start.a0, base.start.b0))
    return fetch(kept).double() + base.scaling * b0 @ a0


def deltas64(layer: PissaLayer, adapter: str = "default") -> tuple[Tensor, Tensor]:
    """What is trained, as matrices that collect gradients."""
    return tuple(fetch(delta.detach()).double().requires_grad_() for delta in layer.deltas(adapter))


def change64(layer: PissaLayer, da: Tensor, db: Tensor, adapter: str = "default", absolute: bool = False) -> Tensor:
    """s (B A - B0 A0), as the paper writes it. With `absolute` the terms that the layer sums, in absolute value: of
    dB A and B0 dA."""
    start = layer.start_of(adapter)
    a0, b0, scaling = fetch(start.a0).double(), fetch(start.b0).double(), layer.scaling[adapter]
    if absolute:
        return scaling * (db.abs() @ (a0.abs() + da.abs()) + b0.abs() @ da.abs())
    return scaling * ((b0 + db) @ (a0 + da) - b0 @ a0)


def weight64(layer: PissaLayer, base: Tensor, da: Tensor, db: Tensor, absolute: bool = False) -> Tensor:
    """The matrix that the adapter makes of `base`; `absolute` as for `change64`."""
    return (base.abs() if absolute else base) + change64(layer, da, db, absolute=absolute)


def assert_papers_function(model: nn.Module, x: Tensor) -> None:
    """Output and gradients of a wrapped model of one linear layer, `proj`, in float32, for an input [..., in]."""
    layer, x = model.base_model.model.proj, x.detach().requires_grad_()
    y = model(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    y.backward(put(dy))
    x64 = fetch(x.detach()).double().requires_grad_()
    da, db = deltas64(layer)
    y64 = x64 @ weight64(layer, base64(layer), da, db).T
    if layer.bias is not None:
        y64 = y64 + fetch(layer.bias.detach()).double()
    y64.backward(dy.double())
    # Each is a sum of products of float32 numbers; `in` terms bound the growth of the rounding error.
    pairs = [(y, y64), (x.grad, x64.grad)]
    pairs += zip((factor.grad for factor in layer.factor_parameters("default")), (da.grad, db.grad), strict=True)
    for got, expected in pairs:
        assert error(got, expected) < 2 * x.shape[-1] * EPS[torch.float32]
    assert all(parameter.grad is None for parameter in layer.base_layer.parameters())


def assert_principal(start: StartFactors, scaling: float, weight: Tensor, what: str = "the layer") -> None:
    """The start factors are the principal part of a float64 matrix: no other of their rank leaves much less of it."""
    weight = fetch(weight)
    a0, b0 = fetch(start.a0).double(), fetch(start.b0).double()
    rest = weight - scaling * b0 @ a0
    left = torch.linalg.matrix_norm(rest)
    best = torch.linalg.vector_norm(torch.linalg.svdvals(weight)[len(a0) :])
    # A float32 SVD is that of a matrix which differs by about its size in roundings.
    rounding = max(weight.shape) * EPS[torch.float32] * torch.linalg.matrix_norm(weight)
    assert left <= 1.001 * best + rounding, f"{what}: {left} is left of the weight, {best} with the exact SVD"
    # That hardly sees factors of a wrong length: their error is at right angles to what is left. In the directions of
    # one factor, that of the matrix's shorter side, nothing is left but roundings, also those of the two factors.
    directions = (rest @ torch.linalg.qr(a0.mT).Q, rest.mT @ torch.linalg.qr(b0).Q)
    along = min(map(torch.linalg.matrix_norm, directions))
    assert along <= 4 * rounding, f"{what}: {along} is left in the directions of a factor, allowed {4 * rounding}"
