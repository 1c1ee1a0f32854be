"""The starts that are compared: an adapter of rank 16 beside a base in NF4 (blocks of 64, nested scales)."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

import pissa
from pissa import ops
from pissa.config import Init, PissaConfig

RANK = 16


class Start(NamedTuple):
    """How a base is repaired, and where the adapter on it starts."""

    quant_iters: int
    """Alternations of the repaired base Q + B0 A0; 0: the base is nf4(W)."""
    init: Init
    """"pissa": the adapter starts from the base's own factors. "lora": from B = 0."""


STARTS = {
    "T = 1": Start(1, "pissa"),
    "T = 5": Start(5, "pissa"),
    "LoRA on T = 1": Start(1, "lora"),
    "LoRA on T = 5": Start(5, "lora"),
    "QLoRA": Start(0, "lora"),
}


def wrap(model: nn.Module, start: Start, seed: int, task_type: str) -> pissa.PissaModel:
    """The model with that start in all linear layers. `seed` is of LoRA's start."""
    config = PissaConfig(
        r=RANK,
        quant="nf4",
        quant_iters=max(1, start.quant_iters),
        init=start.init,
        repair="pissa" if start.quant_iters else None,
        seed=seed if start.init == "lora" else 0,
        task_type=task_type,
    )
    return pissa.wrap(model, config)


def repaired(weight: Tensor, quant_iters: int) -> Tensor:
    """Q + B0 A0 of a weight [out, in], float32."""
    a0, b0, residual, *_ = ops.split(weight, min(RANK, *weight.shape), form="nf4", quant_iters=quant_iters)
    assert isinstance(residual, ops.QuantizedWeight)
    return ops.dequantize(residual).addmm_(b0, a0)


def quantised(weight: Tensor) -> Tensor:
    """nf4(W)."""
    return ops.dequantize(ops.quantize(weight, "nf4"))


def dense_weights(model: nn.Module) -> dict[str, Any]:
    """The weights of the linear layers by name; wrapping leaves them as they are."""
    return {name: module.weight.detach() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
