"""Chats as tokens. Only the tokens of the answer have a part in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pissa.cli.data import Chat
from pissa.cli.terminal import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that has no part in the loss, as in torch's cross_entropy."""

# The prompt of Stanford Alpaca, which the paper's authors train with, for tokenizers without a chat template.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@dataclass(frozen=True)
class Example:
    """Tokens and labels of one chat, of equal length; the labels of the prompt are IGNORED."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Encoded:
    """The examples, the number of answers that were cut, and the number of prompts that left no room for an answer."""

    examples: list[Example]
    cut: int
    dropped: int

    @property
    def longest(self) -> int:
        return max(len(example.input_ids) for example in self.examples)


def encode(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Tokenizes chats and cuts each after `max_length` tokens.

    Raises:
        UserError: no chat fits, or the tokenizer's template cannot express one.
    """
    examples, cut = [], 0
    for chat in chats:
        prompt, answer = prompt_and_answer(chat, tokenizer)
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        answer_ids = tokenizer(answer, add_special_tokens=False).input_ids
        room = max_length - len(prompt_ids)
        if room < 1:
            continue
        cut += len(answer_ids) > room
        answer_ids = answer_ids[:room]
        examples.append(Example(prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids))
    if not examples:
        raise UserError(f"no prompt of {len(chats)} is shorter than --max-length {max_length} tokens; raise it")
    return Encoded(examples, cut, len(chats) - len(examples))


def prompt_and_answer(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Returns the text that the model is given, and the text that it shall give: the last message and its end token."""
    if tokenizer.chat_template is None:
        prompt, answer = _alpaca(chat, tokenizer)
    else:
        prompt = chat_prompt(chat.messages[:-1], tokenizer)
        whole = tokenizer.apply_chat_template(chat.messages, tokenize=False)
        if not whole.startswith(prompt):
            raise UserError(
                f"{chat.where}: the tokenizer's chat template changes the prompt once the answer follows, so prompt "
                "and answer cannot be told apart; use another template, or remove it to train with the Alpaca prompt"
            )
        answer = whole[len(prompt) :]
    # A template ends a turn with a line break, which is no part of the answer.
    ended = answer.rstrip()
    if ended.endswith(tuple(tokenizer.all_special_tokens)):
        return prompt, ended
    return prompt, answer + (tokenizer.eos_token or "")


def chat_prompt(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that asks the model to answer the last of `messages`, by the tokenizer's chat template."""
    prompt: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return prompt


def _alpaca(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    if [message["role"] for message in chat.messages] != ["user", "assistant"]:
        raise UserError(
            f"{chat.where}: the tokenizer has no chat template, so only one user and one assistant message are "
            f"allowed; found {', '.join(message['role'] for message in chat.messages)}"
        )
    question, answer = (message["content"] for message in chat.messages)
    # A template writes the start token itself. Without one, we write it if the tokenizer starts texts with it.
    starts = tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return (tokenizer.bos_token if starts else "") + _ALPACA.format(instruction=question), answer


class Collator:
    """Pads examples at the right to one length: int64 tensors input_ids, attention_mask and labels, [batch, length]."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        length = max(len(example.input_ids) for example in examples)

        def padded(rows: list[list[int]], value: int) -> Tensor:
            return torch.tensor([row + [value] * (length - len(row)) for row in rows])

        return {
            "input_ids": padded([example.input_ids for example in examples], self.pad_token_id),
            "attention_mask": padded([[1] * len(example.input_ids) for example in examples], 0),
            "labels": padded([example.labels for example in examples], IGNORED),
        }
