"""The check before the first step: the wrapped model computes what the base computes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

_NOT_THE_MODELS = ("labels", "completion_mask", "ref_chosen_logps", "ref_rejected_logps")


class Step0(NamedTuple):
    """The relative difference of the logits with and without the adapter, the largest that rounding explains, and the
    norm of the logits, over a number of `tokens`."""

    difference: float
    bound: float
    norm: float
    tokens: int

    @property
    def passed(self) -> bool:
        return self.difference <= self.bound  # False for NaN


def step0_check(model: PeftModel, batch: dict[str, Any]) -> Step0:
    """Compares the logits before training with the adapter enabled (the model) and disabled (the base). An adapter that
    starts wrong (PiSSA on a base that has lost its principal part) differs by about 1.

    Args:
        model: with one active adapter. Afterwards it is in evaluation mode.
        batch: as a trainer of TRL collates it, on the model's device; tokens that attention_mask leaves out are not
            compared.
    """
    model.eval()
    inputs = {key: value for key, value in batch.items() if key not in _NOT_THE_MODELS}
    with torch.no_grad():
        enabled = _logits(model, inputs)
        with model.disable_adapter():
            disabled = _logits(model, inputs)
    norm = torch.linalg.vector_norm(disabled).item()
    difference = torch.linalg.vector_norm(enabled - disabled).item() / norm
    return Step0(difference, rounding_bound(model), norm, len(disabled))


def rounding_bound(model: PeftModel) -> float:
    """The largest relative difference of logits that rounding explains, between two passes that compute the same
    function and may round differently.

    With k the inner dimension of an adapted layer, a sum of k products in float32 (u = eps/2) is off by about √k u of
    its norm, once in each of the two passes; the layer's output is then rounded to the base's dtype, eps at most
    between the two. These errors are independent from layer to layer and pass the layers above with a gain near 1, so
    they add up as a random walk does: √(Σ 2 k u²) + √n eps(dtype) for n layers.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    summation = math.sqrt(sum(2 * layer.in_features for layer in layers)) * torch.finfo(torch.float32).eps / 2
    return summation + math.sqrt(len(layers)) * torch.finfo(model.get_base_model().dtype).eps


def _logits(model: PeftModel, inputs: dict[str, Any]) -> Tensor:
    logits: Tensor = model(**inputs, use_cache=False).logits
    mask = inputs.get("attention_mask")
    return (logits.flatten(0, 1) if mask is None else logits[mask.bool()]).float()
