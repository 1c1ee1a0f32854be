"""AdaLoRA (arXiv 2303.10512): the singular values are trained as a vector of their own, and a loss keeps the singular
vectors orthogonal. Its parameters are dE, dV and dB; files/pissa_layout.py says what its files hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pissa.distributed import whole_with_gradient
from pissa.layers.layer import pissa_layers


def orthogonality_loss(model: nn.Module, adapter_name: str) -> Tensor:
    """‖V Vᵀ - I‖² + ‖Uᵀ U - I‖² (eq. 4 there) for V = V0 + dV [r, in] and U = B0 + dB [out, r], the mean over all such
    matrices of an adapter with `use_adalora`, float32. It is 0 at the start, where V0 and B0 are singular vectors. If
    fully_shard has sharded the adapter, all processes have to call this.

    Args:
        model: the (unwrapped) model.
    """
    squares = []
    for layer in pissa_layers(model, adapter_name).values():
        start = layer.start_of(adapter_name)
        a, b = map(whole_with_gradient, layer.deltas(adapter_name)[:2])
        for vectors in (start.values_and_vectors()[1] + a, (start.b0 + b).mT):
            identity = torch.eye(len(vectors), device=vectors.device)
            squares.append((vectors @ vectors.mT - identity).square().sum())
    return torch.stack(squares).mean()


def add_orthogonality_loss(model: Any, inputs: Any, outputs: Any) -> None:
    """A forward hook of PissaModel: in training mode, adds the orthogonality loss of each active adapter with
    `use_adalora`, times its `orth_reg_weight`, to the model's loss. A loss that is computed elsewhere from the logits
    lacks it, as with PEFT's AdaLoraModel."""
    if not model.training or not isinstance(getattr(outputs, "loss", None), Tensor):
        return
    for name in model.active_adapters:
        config = model.peft_config.get(name)
        if config is not None and config.use_adalora:
            loss = orthogonality_loss(model.base_model.model, name)
            outputs.loss = outputs.loss + config.orth_reg_weight * loss.to(outputs.loss.device)
