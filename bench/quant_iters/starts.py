"""The starts that are compared: an adapter of rank r beside a base in NF4 (blocks of 64, nested scales)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

import pissa
from pissa import ops
from pissa.base.start import StartFactors
from pissa.config import PissaConfig
from pissa.layers.layer import PissaLayer, pissa_layers

RANK = 16
FORM = {"form": "nf4", "blocksize": 64, "double_quant": True}


class Start(NamedTuple):
    """How a base is repaired, and where the adapter on it starts."""

    name: str
    quant_iters: int
    """Alternations of the repaired base Q + B0 A0; 0: the base is nf4(W)."""
    init: str
    """"pissa": the adapter starts from the base's own factors. "lora": from B = 0."""


STARTS = {
    start.name: start
    for start in (
        Start("T = 1", 1, "pissa"),
        Start("T = 5", 5, "pissa"),
        Start("LoRA on T = 1", 1, "lora"),
        Start("LoRA on T = 5", 5, "lora"),
        Start("QLoRA", 0, "lora"),
    )
}


def alternate(weight: Tensor, r: int, quant_iters: int) -> tuple[ops.QuantizedWeight, Tensor, Tensor]:
    """Q, A0 [r, in] and B0 [out, r] of a weight [out, in].

    With L_0 the principal part of W: Q_t = nf4(W - L_{t-1}) and L_t the principal part of W - Q_t, for t = 1 to
    `quant_iters`; the result is the pair Q_t, L_t whose error W - Q_t - L_t is the least in the Frobenius norm. One
    alternation is the plain start, Q_1 and L_0, without the second decomposition.
    """
    a0, b0, _ = ops.split(weight, r)
    if quant_iters == 1:
        return _residual(weight, a0, b0), a0, b0
    tried = []
    for _ in range(quant_iters):
        residual = _residual(weight, a0, b0)
        rest = weight.float() - ops.dequantize(residual)
        a0, b0, _ = ops.split(rest, r)
        tried.append(((rest - b0 @ a0).norm().item(), (residual, a0, b0)))
    return min(tried, key=lambda one: one[0])[1]


def _residual(weight: Tensor, a0: Tensor, b0: Tensor) -> ops.QuantizedWeight:
    residual = ops.residual(weight, a0, b0, **FORM)
    assert isinstance(residual, ops.QuantizedWeight)
    return residual


def wrap(model: nn.Module, start: Start, seed: int, **fields: object) -> pissa.PissaModel:
    """The model with that start in all linear layers. `seed` is of LoRA's start; decompositions have seed 0."""
    dense = {name: module.weight.detach() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    init, own_seed = ("pissa", 0) if start.quant_iters else (start.init, seed)
    config = PissaConfig(r=RANK, quant="nf4", init=init, seed=own_seed, **fields)
    wrapped = pissa.wrap(model, config)
    layers = pissa_layers(wrapped.get_base_model())
    if start.quant_iters > 1:
        _repair(layers, dense, start.quant_iters, config)
    if start.quant_iters and start.init == "lora":
        _start_from_zero(layers, seed)
    return wrapped


def _repair(
    layers: Mapping[str, PissaLayer], dense: Mapping[str, Tensor], quant_iters: int, config: PissaConfig
) -> None:
    """Gives the layers the bases of more alternations."""
    for name, layer in layers.items():
        residual, a0, b0 = alternate(dense[name], layer.r["default"], quant_iters)
        start = StartFactors(a0, b0, layer.origin("default", config))
        layer.store_base(residual, start, config)
        layer.start_from("default", start)


def _start_from_zero(layers: Mapping[str, PissaLayer], seed: int) -> None:
    """Starts the adapter as LoRA does, on the base that is there."""
    config = PissaConfig(r=RANK, init="lora", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        a0, b0 = layer.empty_factors("default")
        bound = a0.shape[1] ** -0.5
        a0.uniform_(-bound, bound, generator=generator)
        layer.start_from("default", StartFactors(a0, b0.zero_(), layer.origin("default", config)))
