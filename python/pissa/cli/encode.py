"""Chats as tokens. Only the tokens of the answer have a part in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pissa.cli.data import Chat
from pissa.cli.terminal import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that has no part in the loss, as in torch's cross_entropy."""

# The prompt of Stanford Alpaca, which the paper's authors train with, for tokenizers without a chat template.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def encode(
    chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[dict[str, list[int]]], int, int]:
    """Tokenizes chats and cuts each after `max_length` tokens.

    TRL's own tokens of a chat would have the line break that a template puts after an answer in the loss.

    Returns:
        Rows of input_ids and labels of equal length, which TRL takes as they are; the number of answers that were cut;
        the number of chats that are left out, since their prompt leaves no room for an answer.

    Raises:
        UserError: no chat fits, or the tokenizer's template cannot express one.
    """
    rows, cut = [], 0
    for chat in chats:
        prompt, answer = (
            tokenizer(text, add_special_tokens=False).input_ids for text in prompt_and_answer(chat, tokenizer)
        )
        room = max_length - len(prompt)
        if room > 0:
            cut += len(answer) > room
            rows.append({"input_ids": prompt + answer[:room], "labels": [IGNORED] * len(prompt) + answer[:room]})
    if not rows:
        raise UserError(f"no prompt of {len(chats)} is shorter than --max-length {max_length} tokens; raise it")
    return rows, cut, len(chats) - len(rows)


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
    return (tokenizer.bos_token if starts else "") + ALPACA.format(instruction=question), answer
