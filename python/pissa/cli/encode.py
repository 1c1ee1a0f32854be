"""From messages to tokens: the loss sees the answer and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pissa.cli.data import Record
from pissa.cli.errors import UserError

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
    """Tokens and labels of one record, of equal length; the labels of the prompt are IGNORED."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Encoded:
    """The examples, how many answers were cut at the maximum length, and how many prompts left no room for any."""

    examples: list[Example]
    cut: int
    dropped: int

    @property
    def longest(self) -> int:
        return max(len(example.input_ids) for example in self.examples)


def encode(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Tokenizes records; what is longer than `max_length` tokens loses its end.

    Raises:
        UserError: no record fits, or the tokenizer's template cannot express a record.
    """
    examples, cut = [], 0
    for record in records:
        prompt, answer = prompt_and_answer(record, tokenizer)
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        answer_ids = tokenizer(answer, add_special_tokens=False).input_ids
        room = max_length - len(prompt_ids)
        if room < 1:
            continue
        cut += len(answer_ids) > room
        answer_ids = answer_ids[:room]
        examples.append(Example(prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids))
    if not examples:
        raise UserError(f"no prompt of {len(records)} is shorter than --max-length {max_length} tokens; raise it")
    return Encoded(examples, cut, len(records) - len(examples))


def prompt_and_answer(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The text that the model is given, and the one that it shall give: the last message, with its end token."""
    if tokenizer.chat_template is None:
        prompt, answer = _alpaca(record, tokenizer)
    else:
        prompt = chat_prompt(record.messages[:-1], tokenizer)
        whole = tokenizer.apply_chat_template(record.messages, tokenize=False)
        if not whole.startswith(prompt):
            raise UserError(
                f"{record.where}: the tokenizer's chat template changes the prompt once the answer follows, so prompt "
                "and answer cannot be told apart; use another template, or remove it to train with the Alpaca prompt"
            )
        answer = whole[len(prompt) :]
    # Templates put a line break after the end of a turn; it is no part of the answer.
    ended = answer.rstrip()
    if ended.endswith(tuple(tokenizer.all_special_tokens)):
        return prompt, ended
    return prompt, answer + (tokenizer.eos_token or "")


def chat_prompt(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """What the model is given to answer the last of `messages`, with the tokenizer's chat template."""
    prompt: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return prompt


def _alpaca(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    if [message["role"] for message in record.messages] != ["user", "assistant"]:
        raise UserError(
            f"{record.where}: the tokenizer has no chat template, so only one user and one assistant message are "
            f"allowed; found {', '.join(message['role'] for message in record.messages)}"
        )
    question, answer = (message["content"] for message in record.messages)
    # A template writes the start token itself; here it is written for the tokenizers that put it before a text.
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
