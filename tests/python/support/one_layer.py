"""One layer of any kind as a model, and what its adapter must compute, in float64.

A kind is described by its base function `apply(x, weight, bias)`, where weight is the matrix [out, in] that PiSSA
decomposes. It is linear in x and in the weight, so that the bound of its rounding errors is the same function of
absolute values.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

import pissa
from devices import fetch, put
from oracle import change_a_little, deltas64, weight64
from pissa.base.classes import base_of
from pissa.layers.layer import PissaLayer
from reference import EPS, assert_close

Apply = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


class OneLayer(nn.Module):
    """A layer with a name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.proj = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def wrap(layer: nn.Module, **fields: object) -> pissa.PissaModel:
    return pissa.wrap(OneLayer(layer), target_modules=["proj"], **fields)


def adapted(model: nn.Module) -> PissaLayer:
    return model.base_model.model.proj


def filled(layer: nn.Module, seed: int = 0) -> nn.Module:
    """The layer with parameters drawn from that seed, of a size that keeps its outputs near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            size = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 1.0
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return layer


def unit_error(layer: PissaLayer, terms: int) -> float:
    """Relative to the sum of all terms' absolute values: a sum of that many terms, in any order, two of the adapter's
    rank, of A x and of B A x, and a handful of operations that join them, in float32."""
    return (terms + 2 * layer.r["default"] + 6) * EPS[torch.float32]


def assert_output(
    y: Tensor, layer: PissaLayer, x: Tensor, base: Tensor, bias: Tensor | None, apply: Apply, terms: int, what: str
) -> None:
    """The output `y` for x, in float32, against the formula in float64; see `assert_function_and_gradients`."""
    x = fetch(x.detach())
    x = x.double() if x.is_floating_point() else x
    delta = [delta.detach() for delta in deltas64(layer)]
    expected = apply(x, weight64(layer, base, *delta), bias)
    sizes = (
        x.abs(),
        weight64(layer, base, *(d.abs() for d in delta), absolute=True),
        None if bias is None else bias.abs(),
    )
    assert_close(y.detach(), expected, unit_error(layer, terms) * apply(*sizes), what)


def assert_function_and_gradients(
    model: nn.Module, x: Tensor, base: Tensor, bias: Tensor | None, apply: Apply, terms: int
) -> None:
    """The output and the gradients of the layer in float32 against the formula in float64.

    Args:
        x: input; its gradient is compared too where it asks for one.
        base, bias: the base's, float64 on the CPU.
        apply: the base function.
        terms: of the longest sum that is taken, of an output or a gradient.
    """
    layer = adapted(model)
    change_a_little(layer)
    y = model(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    y.backward(put(dy))
    got = [
        *([x.grad] if x.requires_grad else []),
        *layer.as_matrices(*(p.grad for p in layer.factor_parameters("default"))),
    ]

    def gradients(absolute: bool) -> list[Tensor]:
        sign = torch.abs if absolute else torch.clone
        at = fetch(x.detach())
        at = sign(at.double()).requires_grad_(x.requires_grad) if x.is_floating_point() else at
        da, db = (sign(delta.detach()).requires_grad_() for delta in deltas64(layer))
        out = apply(at, weight64(layer, base, da, db, absolute), bias)
        wanted = [at, da, db] if x.requires_grad else [da, db]
        return list(torch.autograd.grad(out, wanted, sign(dy.double())))

    assert_output(y, layer, x, base, bias, apply, terms, "output")
    names = ["x", "dA", "dB"] if x.requires_grad else ["dA", "dB"]
    for name, value, expected, size in zip(names, got, gradients(False), gradients(True), strict=True):
        assert_close(value, expected, unit_error(layer, terms) * size, f"gradient of {name}")
    trained = set(map(id, layer.factor_parameters("default")))
    assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in trained)


def assert_merges(model: nn.Module, base: Tensor) -> nn.Module:
    """Merging rounds the sum, taken in float32, once to the base's dtype; unmerging gives the base back. Returns what
    merge_and_unload leaves in the layer's place."""
    layer = adapted(model)
    change_a_little(layer)
    before, state = layer.base_layer, {name: value.clone() for name, value in layer.base_layer.state_dict().items()}
    da, db = (delta.detach() for delta in deltas64(layer))
    expected, magnitude = (weight64(layer, base, da, db, absolute) for absolute in (False, True))
    model.merge_adapter()
    merged = base_of(layer.base_layer).matrix().detach()
    assert_close(merged, expected, unit_error(layer, 1) * magnitude, "merged weight")
    model.unmerge_adapter()
    assert layer.base_layer is before
    assert all(torch.equal(value, state[name]) for name, value in before.state_dict().items())
    merged = model.merge_and_unload().proj
    assert not isinstance(merged, PissaLayer)
    return merged


def assert_comes_back(model: nn.Module, make: Callable[[], nn.Module], x: Tensor, folder: Path) -> nn.Module:
    """A saved adapter restored onto a fresh base computes the same bits. Returns the fresh base with the adapter as
    plain PEFT loads it."""
    change_a_little(adapted(model))
    model.save_pretrained(folder)
    with torch.no_grad():
        restored = pissa.PissaModel.from_pretrained(OneLayer(make()), folder)
        assert torch.equal(restored(x), model.eval()(x))
    return peft.PeftModel.from_pretrained(OneLayer(make()), folder)
