"""Scores of an output layer for the next tokens: their log-probabilities and the loss, without logits in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pissa.ops._linear import as_ops_take, check_operands
from pissa.ops._quant import QuantizedWeight
from pissa.ops.checks import check_devices, check_number

_OPS = torch.ops.pissa
IGNORED = -100
"""The label of a token that is not counted, as in torch and transformers."""


class TokenScores(NamedTuple):
    """Scores of tokens, each in the labels' shape, float32 except for the last; 0 where a label is -100."""

    log_probs: Tensor
    """The logarithms of the labels' probabilities p. Only these have a gradient."""
    entropy: Tensor
    """The entropy of p."""
    log_sum_sq_probs: Tensor
    """The logarithm of the sum of p² over the vocabulary."""
    mean_logits: Tensor
    """The mean of the scaled and capped logits."""
    is_top1: Tensor
    """Whether no logit is larger than the label's."""


def token_scores(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> TokenScores:
    """Computes scores of labels under `softmax(z)` with z = scale (x Wᵀ + bias), or softcap · tanh(z / softcap)::

        scores = token_scores(hidden[:, :-1], head.weight, labels[:, 1:])
        loss = -scores.log_probs.sum() / (labels[:, 1:] != -100).sum()

    Logits are computed for a part of the vocabulary at a time and discarded. There is one product for the forward and
    one for the gradient of x, which is computed at once and kept together with x, in its dtype. A token with label -100
    costs nothing. Products are computed as in `linear`; what follows them is float32. Differentiable in x, once; weight
    and bias are frozen.

    Args:
        x: [..., in], float32, bfloat16 or float16: hidden states.
        weight: [vocabulary, in] in any of these dtypes, or `QuantizedWeight`.
        labels: [...] of int64, from 0 to the vocabulary's size, or -100. On CUDA, where checking would wait, a label
            outside this range gives NaN.
        bias: [vocabulary], or None.
        scale: factor of the logits, any finite number.
        softcap: bound of the logits, positive, or None.

    Returns:
        The scores, [...] each, on x's device.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    held = check_operands(x, weight, bias)
    x, op, slots = as_ops_take(x, weight)
    if labels.dtype != torch.int64 or labels.shape != x.shape[:-1]:
        raise ValueError(
            f"labels: got {labels.dtype} of shape {list(labels.shape)}; needed: int64 of shape {list(x.shape[:-1])}"
        )
    check_number("scale", scale)
    if softcap is not None:
        check_number("softcap", softcap, "a positive, finite number, or None", above=0)
    check_devices({"x": x, "weight": held, "bias": bias, "labels": labels})
    counted = labels != IGNORED
    chosen = labels[counted]
    if (
        chosen.device.type == "cpu"
        and chosen.numel()
        and not 0 <= int(chosen.min()) <= int(chosen.max()) < weight.shape[0]
    ):
        labels_given = f"{int(chosen.min())} to {int(chosen.max())}"
        raise ValueError(f"labels: got {labels_given}; allowed: 0 to {weight.shape[0] - 1}, and {IGNORED}")
    need_dx = torch.is_grad_enabled() and x.requires_grad
    name = "token_scores" if op == "linear" else "quantized_token_scores"
    scores, _ = getattr(_OPS, name)(x[counted], *slots, bias, chosen, float(scale), float(softcap or 0), need_dx)
    everywhere = scores.new_zeros((*labels.shape, scores.shape[-1])).masked_scatter(counted[..., None], scores)
    log_probs, *others = everywhere.unbind(-1)
    entropy, log_sum_sq_probs, mean_logits, is_top1 = (other.detach() for other in others)
    return TokenScores(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1.bool())
