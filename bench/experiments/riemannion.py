"""An optimiser that does not see how long the factors are: Muon on their product, in the manifold of matrices of rank r
(Riemannion, arXiv 2507.12142)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pissa.layers.layer import pissa_layers
from pissa.ops.low_rank import Spectrum

_SCALE = 0.2
"""The root mean square of a step, in rates: AdamW's."""


class Riemannion(Optimizer):
    """Steps of a wrapped model's products B A [out, in] along the orthogonal factor of their momentum, a vector of the
    tangent space: G's projection U Uᵀ G + G V Vᵀ - U Uᵀ G V Vᵀ for the bases U of B's columns and V of A's rows. The
    sum is cut to rank r by its singular values, of which either factor has the roots."""

    def __init__(self, model: Any, lr: float, momentum: float = 0.9) -> None:
        self._layers = list(pissa_layers(model.base_model.model).values())
        parameters = [parameter for layer in self._layers for parameter in layer.factor_parameters("default")]
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        [group] = self.param_groups
        for layer in self._layers:
            start, (da, db) = layer.start_of("default"), layer.factor_parameters("default")
            state, a, b = self.state[da], start.a0 + da, start.b0 + db
            x, y = _tangent(a, b, da.grad, db.grad, state.get("momentum"), group["momentum"])
            state["momentum"] = x, y
            found = Spectrum.of(y.double(), x.double())
            there = found.values > 1e-6 * found.values[0]  # the others are roundings
            left, right = found.left[:, there], found.right[there]
            size = group["lr"] * _SCALE * (len(left) * right.shape[1] / max(len(right), 1)) ** 0.5
            moved = Spectrum.of(torch.cat([a.double(), right]), torch.cat([b.double(), -size * left], 1))
            new_a, new_b = moved.factors(slice(0, len(a)))
            da.copy_(new_a - start.a0)
            db.copy_(new_b - start.b0)


def _tangent(
    a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, before: tuple[Tensor, Tensor] | None, momentum: float
) -> tuple[Tensor, Tensor]:
    """The thin factors of the projected gradient, and of what the momentum's projection adds. While B is 0 it has no
    columns that a step could keep."""
    v, of_a = torch.linalg.qr(a.mT)
    gv = grad_b @ torch.linalg.pinv(of_a)
    if b.any():
        u, of_b = torch.linalg.qr(b)
        ug = torch.linalg.pinv(of_b.mT) @ grad_a
    else:
        u, ug = b[:, :0], a[:0]
    if before is not None:
        x, y = before
        ug = ug + momentum * (u.mT @ x) @ y
        gv = gv + momentum * x @ (y @ v)
    return torch.cat([u, gv - u @ (u.mT @ gv)], 1), torch.cat([ug, v.mT])
