"""The check before the first step: the wrapped model computes what the base computes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor


class SelfCheck(NamedTuple):
    """The relative difference of the logits with and without the adapter, and the largest that rounding explains."""

    difference: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.bound  # False for NaN


def step0_check(model: PeftModel, batch: dict[str, Tensor], dtype: torch.dtype) -> SelfCheck:
    """Compares the logits before training with the adapter enabled (the model) and disabled (the base).

    Both passes compute the same function and may round differently. With k the inner dimension of an adapted layer, a
    sum of k products in float32 (u = eps/2) is off by about √k u of its norm, once in each of the two passes; the
    layer's output is then rounded to `dtype`, eps at most between the two. These errors are independent from layer to
    layer and pass the layers above with a gain near 1, so they add up as a random walk does: √(Σ 2 k u²) + √n
    eps(dtype) for n layers. An adapter that starts wrong (PiSSA on a base that has lost its principal part) differs by
    about 1.

    Args:
        model: with one active adapter.
        batch: input_ids and attention_mask, [batch, length]; padding is left out of the comparison.
        dtype: of the base model.
    """
    was_training = model.training
    model.eval()
    inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        enabled = _logits(model, inputs)
        with model.disable_adapter():
            disabled = _logits(model, inputs)
    model.train(was_training)
    difference = torch.linalg.vector_norm(enabled - disabled) / torch.linalg.vector_norm(disabled)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    summation = math.sqrt(sum(2 * layer.in_features for layer in layers)) * torch.finfo(torch.float32).eps / 2
    bound = summation + math.sqrt(len(layers)) * torch.finfo(dtype).eps
    return SelfCheck(difference.item(), bound)


def _logits(model: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits[inputs["attention_mask"].bool()].float()
