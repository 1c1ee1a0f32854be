"""Chats as the text that a model is given and the text that it should answer, by its tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from pissa.cli.terminal import UserError, print_row, user_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The Stanford Alpaca prompt, with which the paper's authors train, as a chat template. A system message replaces its
# first sentence.
ALPACA = (
    "{% if messages[0]['role'] != 'system' %}Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.\n\n{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n### Response:' }}"
    "{% else %}{{ message['content'] }}{{ eos_token }}{{ '' if loop.last else '\n\n' }}{% endif %}{% endfor %}"
)

# How the reasoning models that begin an answer with their thoughts mark them.
_THINKING, _THOUGHT = "<think>\n", "</think>"
_INSEPARABLE = (
    "the tokenizer's chat template changes the prompt once the answer follows, so prompt and answer cannot be "
    "separated; use another template, or remove it to train with the Alpaca prompt [P108]"
)


class Chat(NamedTuple):
    """Messages, each {"role", "content"}, of which the last is the assistant's, and `where` they are, for error
    messages. A single message is a plain text, which no template surrounds."""

    where: str
    messages: list[dict[str, str]]

    @property
    def is_text(self) -> bool:
        return [message["role"] for message in self.messages] == ["assistant"]


def give_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a tokenizer without a chat template the Alpaca prompt, which is then saved with it: every program that
    reads it gives the model the prompt with which it was trained."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = ("{{ bos_token }}" if _starts(tokenizer) else "") + ALPACA


def check_template(tokenizer: PreTrainedTokenizerBase, system: str | None) -> None:
    """Says what happens to messages where there is no template, and refuses a system prompt there."""
    if tokenizer.chat_template is None:
        if system is not None:
            raise UserError("--system: the tokenizer has no chat template, which would place it; leave it out [P115]")
        print_row("note", "the tokenizer has no chat template: each text is continued, without the others [P115]")


def prompt_text(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the text that the model is given before its answer. It includes the start token."""
    return _text(messages, tokenizer, add_generation_prompt=True)


def prompt_and_answer(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Returns the text that the model is given, and the text that it should produce: the last message and its end
    token."""
    if chat.is_text:
        start = tokenizer.bos_token if _starts(tokenizer) else ""
        return start, chat.messages[0]["content"] + (tokenizer.eos_token or "")
    turn = chat.messages[-2:]  # of the whole chat, some templates move the system message once the answer follows
    with user_errors(UserError, before=f"{chat.where}: "):
        prompt = prompt_text(chat.messages[:-1], tokenizer)
        begun = prompt if len(turn) == len(chat.messages) else prompt_text(turn[:-1], tokenizer)
        answer = _answer(begun, _text(turn, tokenizer), turn[-1]["content"])
    # A template ends a turn with a line break, which is not part of the answer.
    ended = answer.rstrip()
    if ended.endswith(tuple(_special_tokens(tokenizer))):
        return prompt, ended
    return prompt, answer + (tokenizer.eos_token or "")


def check_continues(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that the text of a chat continues that of its prompt, as TRL expects of preferences."""
    with user_errors(UserError, before=f"{chat.where}: "):
        if not _text(chat.messages, tokenizer).startswith(prompt_text(chat.messages[:-1], tokenizer)):
            raise UserError(_INSEPARABLE)


def _answer(prompt: str, text: str, content: str) -> str:
    """The answer in the text of a turn with this prompt."""
    thoughts, thinks, _ = content.rpartition(_THOUGHT)
    begun = prompt.removesuffix(_THINKING)
    if text.startswith(prompt):
        answer = text[len(prompt) :]
    elif text.startswith(begun):  # the template begins thoughts, and takes them out of answers
        thoughts = thoughts.strip().removeprefix(_THINKING.strip()).strip()
        answer = f"{thoughts}\n{_THOUGHT}\n\n{text[len(begun) :].lstrip()}"
    else:
        raise UserError(_INSEPARABLE)
    if thinks and _THOUGHT not in answer:
        raise UserError(
            "the tokenizer's chat template takes out what is before </think>, so it cannot be learned; take it out "
            "of the answers, or use another template [P109]"
        )
    return answer


def end_of_answer(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens at which an answer ends: the one that ends answers in training, and the tokenizer's own."""
    if tokenizer.chat_template is None:
        return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    _, answer = prompt_and_answer(Chat(tokenizer.name_or_path, turns), tokenizer)
    special = _special_tokens(tokenizer)
    ends = {special[text] for text in special if answer.endswith(text)} | {tokenizer.eos_token_id}
    return sorted(ends - {None})


def _text(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    needed = "; needed: messages that the model knows, in the order that it knows, or another template [P110]"
    with user_errors(Exception, before="the tokenizer's chat template refuses: ", after=needed):
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))


def _starts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins texts with its start token. Templates include it."""
    return tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]


@lru_cache(maxsize=1)  # takes milliseconds for thousands of tokens
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens that are not text. `all_special_tokens` lacks those without a role, such as Gemma's end of a turn."""
    return {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
