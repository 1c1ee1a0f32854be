"""Training data: reads records as chats and encodes chats as tokens. Only the tokens of the answer enter the loss."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pissa.cli.templates import Chat, give_template, prompt_and_answer
from pissa.cli.terminal import UserError, user_errors
from pissa.containers.messages import quote

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that does not enter the loss, as in torch's cross_entropy."""

_CHATS = (("messages",), ("question", "answer"), ("prompt", "completion"))
_PREFERENCES = (("prompt", "chosen", "rejected"),)
_ROLES = ("system", "user", "assistant")
_HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair: JSON can contain one, but no tokenizer accepts it."""


# ---- Records ---------------------------------------------------------------------------------------------------------


def is_records(source: str) -> bool:
    """Whether `source` is a file of records. Otherwise it is a data set."""
    return Path(source).suffix in (".json", ".jsonl")


def read_chats(source: str) -> list[Chat]:
    """Reads a .jsonl or .json file. Errors name the file and line, what was found and what is allowed."""
    return [_chat(where, record, *_keys(where, record, _CHATS)) for where, record in _records(source)]


def read_preferences(source: str) -> list[tuple[Chat, Chat]]:
    """Reads a file of preferences: pairs of chats that differ in their answers, the chosen one first."""
    pairs = []
    for where, record in _records(source):
        prompt, chosen, rejected = _keys(where, record, _PREFERENCES)
        pairs.append((_chat(where, record, prompt, chosen), _chat(where, record, prompt, rejected)))
    return pairs


def _records(source: str) -> Iterator[tuple[str, Any]]:
    """Yields each JSON value with its place in the file."""
    path = Path(source)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"{source}: {problem}; allowed: a .jsonl or .json file")
    with user_errors(OSError, ValueError, before=f"{path}: cannot be read: ", after="; allowed: a text file in UTF-8"):
        text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        raise UserError(f"{path}: is empty; needed: at least one record")
    is_list = path.suffix == ".json"
    # Not splitlines(): a JSON string may contain U+2028, where splitlines() would end the line.
    lines = {f"{path}:{number}": line for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    for where, part in {str(path): text}.items() if is_list else lines.items():
        needed = f"; found {quote(part.strip())}; needed: records in JSON"
        with user_errors(ValueError, RecursionError, before=f"{where}: not JSON: ", after=needed):
            value = json.loads(part)
        if not is_list:
            yield where, value
        elif not isinstance(value, list) or not value:
            raise UserError(f"{path}: found {quote(value)}; needed in a .json file: a list of records")
        else:
            yield from ((f"{path}: record {number}", record) for number, record in enumerate(value, 1))


def _keys(where: str, record: Any, forms: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The keys of the first form that the record matches."""
    given = quote(record)
    if isinstance(record, dict):
        for form in forms:
            if {*form} <= record.keys():
                return form
        given = f"an object with the keys {', '.join(map(quote, record)) or 'none'}"
    allowed = ", or ".join(" and ".join(f'"{key}"' for key in form) for form in forms)
    raise UserError(
        f'{where}: found {given}; allowed: an object with {allowed}, which are texts, or messages: [{{"role": "user", '
        '"content": "..."}, {"role": "assistant", "content": "..."}]'
    )


def _chat(where: str, record: dict[str, Any], *keys: str) -> Chat:
    """Returns the chat that a record contains, either as messages or as a prompt and an answer."""
    if image := next((key for key in ("image", "images") if record.get(key)), None):
        raise UserError(
            f'{where}: found "{image}"; a file of records contains only text; allowed: as --data a folder of the '
            'images with metadata.jsonl, whose rows name theirs in "file_name" or "images_file_names", or another data '
            f'set with a column "{image}"'
        )
    messages: list[Any] = []
    for key, role in zip(keys, ("user", "assistant"), strict=False):
        part = record[key]
        messages += part if isinstance(part, list) else [{"role": role, "content": part}]
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f'{where}: found the message {quote(message)}; needed: "role" and "content"')
        if message["role"] not in _ROLES:
            raise UserError(f"{where}: found the role {quote(message['role'])}; allowed: {', '.join(_ROLES)}")
        text = message["content"]
        if not isinstance(text, str) or not text.strip() or _HALF.search(text):
            raise UserError(
                f"{where}: the {message['role']}'s content is {quote(text)}; needed: a text that is not empty, without "
                "half of a surrogate pair, such as \\ud83d alone"
            )
    roles = [message["role"] for message in messages]
    if roles[-2:] != ["user", "assistant"]:
        given = ", ".join(roles) or "none"
        raise UserError(f"{where}: the messages' roles are: {given}; needed: the last two are user, assistant")
    return Chat(where, [{"role": message["role"], "content": message["content"]} for message in messages])


# ---- Tokens ----------------------------------------------------------------------------------------------------------


def encode(
    chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[dict[str, list[int]]], int, int]:
    """Tokenizes chats and cuts each after `max_length` tokens. A tokenizer without a chat template gets one.

    TRL's own tokenisation would include in the loss the line break that a template puts after an answer.

    Returns:
        Rows of input_ids and labels of equal length, which TRL takes as they are; the number of answers that were cut;
        the number of chats that were left out because their prompt leaves no room for an answer.
    """
    give_template(tokenizer)
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


def batches_of(file: str, examples: int, model: str | Path) -> list[Any]:
    """The first chats of a file as a model reads them, for a calibration: input_ids [1, tokens] each."""
    import torch
    from transformers import AutoTokenizer

    with user_errors(OSError, ValueError, before=f"{model} has no tokenizer, which a calibration needs: "):
        tokenizer = AutoTokenizer.from_pretrained(model)
    give_template(tokenizer)
    texts = ["".join(prompt_and_answer(chat, tokenizer)) for chat in read_chats(file)[:examples]]
    longest = min(tokenizer.model_max_length, 2048)
    tokens = [tokenizer(text, add_special_tokens=False).input_ids[:longest] for text in texts]
    return [torch.tensor([row]) for row in tokens]
