"""Greedy answers to instructions and conversations, by lm-eval's generation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pissa.cli.encode import ALPACA

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

STOP = "### Instruction:"
_SYSTEM, _, _TURN = ALPACA.partition(STOP)


def alpaca_prompt(messages: Sequence[dict[str, str]]) -> str:
    """The Alpaca prompt of a conversation that ends with a user's message: further turns repeat its two headings."""
    return _SYSTEM + "".join(map(_turn, messages))


def _turn(message: dict[str, str]) -> str:
    text = message["content"]
    return STOP + _TURN.format(instruction=text) if message["role"] == "user" else f"{text}\n\n"


def answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Continues texts until the model ends, begins an instruction of its own, or has written so many tokens.

    Args:
        model: a causal language model of transformers, with an adapter or without, on its device.
        tokenizer: is not changed. It puts before a prompt what it puts before every text.
        prompts: longer ones than leave room for an answer lose their beginning.

    Returns:
        The new texts, in the order of the prompts.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    # A copy, for lm-eval gives a tokenizer without a padding token one.
    lm = HFLM(model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    generation = {
        "until": [STOP],
        "eos_token_id": tokenizer.eos_token_id,
        "max_gen_toks": max_new_tokens,
        "do_sample": False,
    }
    requests = [Instance("generate_until", {}, (prompt, generation), i) for i, prompt in enumerate(prompts)]
    found: list[str] = lm.generate_until(requests, disable_tqdm=True)
    return found
