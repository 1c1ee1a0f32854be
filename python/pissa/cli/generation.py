"""One answer of a model, by transformers' `generate`."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch


def context_of(model: Any) -> float:
    """The most tokens that a model reads, its answer included; infinite if its configuration says nothing of it."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def generate(
    model: Any, tokenizer: Any, prompt: list[int], most: int, ends: Collection[int], **options: Any
) -> list[int]:
    """Returns the tokens of an answer: at least one, and no more than the model's context leaves room for.

    Args:
        prompt: its tokens.
        most: the most tokens of the answer.
        ends: the tokens at which it ends.
        options: further arguments of `generate`.
    """
    tokens = torch.tensor([prompt], device=model.device)
    answered = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max(1, min(most, context_of(model) - len(prompt))),
        eos_token_id=sorted(ends) or None,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    found: list[int] = answered[0, len(prompt) :].tolist()
    return found
