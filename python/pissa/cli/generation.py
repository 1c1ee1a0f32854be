"""What a model can read, and one answer of it, by transformers' `generate`."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch

from pissa.cli.terminal import UserError
from pissa.containers.messages import quote


def context_of(model: Any) -> float:
    """The most tokens that a model reads, its answer included; infinite if its configuration says nothing of it."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def check_tokens(model: Any, tokenizer: Any, tokens: Iterable[int]) -> None:
    """Raises UserError, naming the token, if the model has no embedding of one of these."""
    embeddings = model.get_input_embeddings()
    rows = getattr(getattr(embeddings, "base_layer", embeddings), "num_embeddings", math.inf)
    if (last := max(tokens, default=0)) >= rows:
        raise UserError(
            f"the tokenizer's token {quote(tokenizer.convert_ids_to_tokens(last))} has the id {last}, and the model "
            f"has {rows} embeddings, of the ids below {rows}; remove the token from the tokenizer, or load the model "
            f"with transformers, call its resize_token_embeddings({last + 1}), and save it as the model to use [P127]"
        )


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
