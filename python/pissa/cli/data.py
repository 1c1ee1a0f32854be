"""Training data: reads records of any form as chats, and encodes chats as tokens. Only the tokens of answers enter the
loss."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pissa.cli.score import are_short
from pissa.cli.sources import Records, records
from pissa.cli.templates import Chat, give_template, prompt_and_answer
from pissa.cli.terminal import UserError, as_rows, user_errors
from pissa.containers.messages import quote

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that does not enter the loss, as in torch's cross_entropy."""

_PAIR = ("question", "answer")
# The columns of a record, by form. The first form that a record has counts, so more columns stand before fewer.
_CHATS = (
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
    _PAIR,
    ("prompt", "completion"),
    ("text",),
)
# The same of records that are to be answered.
_PROMPTS = (("messages",), ("conversations",), ("instruction",), ("question",), ("prompt",), ("text",))
# Other names of columns, which an error message suggests to map.
_ALIKE = {
    "question": ("question", "query", "prompt", "instruction", "problem", "input", "user", "frage"),
    "answer": ("answer", "response", "completion", "output", "solution", "reply", "assistant", "antwort"),
    "text": ("text", "content", "document", "article", "body"),
    "chosen": ("chosen", "preferred", "accepted", "better"),
    "rejected": ("rejected", "dispreferred", "worse"),
}
_ALIKE["prompt"] = _ALIKE["question"]
_ROLES = ("system", "user", "assistant")
_SPEAKERS = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of roles."""
_HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair: JSON can contain one, but no tokenizer accepts it."""


# ---- Forms -----------------------------------------------------------------------------------------------------------


def read_chats(records: Records) -> list[Chat]:
    """Reads records of any form. Errors name the record, what was found and what is allowed."""
    return [_chat(where, _messages(where, *_form(where, record, _CHATS))) for where, record in records]


def read_prompts(records: Records) -> list[Chat]:
    """Reads records of any form as chats that end with the user's message: an answer that they have is left out. A
    plain text stays the assistant's. Where the question is empty, there are no messages."""
    chats = []
    for where, record in records:
        values, form = _form(where, record, _PROMPTS)
        asked = values[form[0]]
        is_empty = asked is None or (isinstance(asked, str) and not asked.strip())
        chat = Chat(where, [] if is_empty else _checked(where, _messages(where, values, form)))
        if len(chat.messages) > 1 and chat.messages[-1]["role"] == "assistant":
            chat.messages.pop()
        if chat.messages and not chat.is_text and chat.messages[-1]["role"] != "user":
            raise UserError(f"{where}: the last message is the system's; needed: the user's [P103]")
        chats.append(chat)
    return chats


def read_preferences(records: Records) -> list[tuple[Chat, Chat]]:
    """Reads records of preferences: pairs of chats that differ in their answers, the chosen one first."""
    pairs = []
    for where, record in records:
        answer = record.get("chosen") if isinstance(record, dict) else None
        prompt = () if isinstance(answer, list) and len(answer) > 1 else ("prompt",)  # whole chats contain it
        values, _ = _form(where, record, [(*prompt, "chosen", "rejected")])
        chosen, rejected = (_chat(where, _messages(where, values, (*prompt, name))) for name in ("chosen", "rejected"))
        if chosen.messages[:-1] != rejected.messages[:-1]:
            raise UserError(f"{where}: chosen and rejected answer different messages; needed: the same ones [P105]")
        pairs.append((chosen, rejected))
    return pairs


def _form(where: str, record: Any, forms: Sequence[tuple[str, ...]]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The record, with names in lower case and whole numbers as texts, and the first form that it has."""
    given = quote(record)
    if isinstance(record, dict):
        lower = {str(key).strip().lower(): str(value) if type(value) is int else value for key, value in record.items()}
        for form in forms:
            if {*form} <= lower.keys():
                if alike := _alike(record, (*form, "input")):
                    names = " and ".join(map(quote, alike))
                    raise UserError(f"{where}: {names} are one name; needed: a name once; rename or remove one [P103]")
                return lower, form
        given = f"the columns {', '.join(map(quote, record)) or 'none'}"
        if suggested := _suggested(record, forms):
            raise UserError(f"{where}: found {given}; tell what they are: --columns {suggested} [P103]")
    allowed = ", or ".join(" and ".join(f'"{key}"' for key in form) for form in forms)
    named = next((form for form in (_PAIR, _PAIR[:1]) if form in forms), forms[-1])
    mapped = ",".join(f"{name}=COLUMN" for name in named)
    raise UserError(
        f'{where}: found {given}; allowed: an object with {allowed}, which are texts, or messages: [{{"role": "user", '
        f'"content": "..."}}, {{"role": "assistant", "content": "..."}}]; name other columns: --columns {mapped} [P103]'
    )


def _alike(record: dict[str, Any], form: Sequence[str]) -> list[str]:
    """The names in a record, if there are several, that stand for the same one of this form."""
    spelled = ([key for key in record if str(key).strip().lower() == name] for name in form)
    return next((keys for keys in spelled if len(keys) > 1), [])


def _suggested(record: dict[str, Any], forms: Sequence[tuple[str, ...]]) -> str | None:
    """What --columns could be for this record, as the names of its columns suggest."""
    for form in (form for form in forms if {*form} <= _ALIKE.keys()):
        columns = [next((name for name in record if str(name).lower() in _ALIKE[key]), None) for key in form]
        if all(columns):
            return ",".join(f"{key}={column}" for key, column in zip(form, columns, strict=True))
    return None


def _messages(where: str, record: dict[str, Any], form: tuple[str, ...]) -> list[Any]:
    """The messages of a record of this form. A plain text is the only message, the assistant's."""
    if image := next((key for key in ("image", "images") if record.get(key)), None):
        raise UserError(
            f'{where}: found "{image}"; a file of records contains only text; allowed: as --data a folder of the '
            'images with metadata.jsonl, whose rows name theirs in "file_name" or "images_file_names", or another data '
            f'set with a column "{image}" [P106]'
        )
    parts = [record[key] for key in form]
    more = record.get("input")
    if "instruction" in form and isinstance(parts[0], str) and isinstance(more, str) and more.strip():
        parts[0] += f"\n\n{more}"
    roles = ("assistant",) if form == ("text",) else ("user", "assistant")
    messages: list[Any] = []
    for part, role in zip(parts, roles, strict=False):
        messages += part if isinstance(part, list) else [{"role": role, "content": part}]
    return messages


def _chat(where: str, messages: list[Any]) -> Chat:
    chat = Chat(where, _checked(where, messages))
    roles = [message["role"] for message in chat.messages]
    if roles[-2:] != ["user", "assistant"] and not chat.is_text:
        given = ", ".join(roles) or "none"
        raise UserError(f"{where}: the messages' roles are: {given}; needed: the last two are user, assistant [P103]")
    return chat


def _checked(where: str, messages: list[Any]) -> list[dict[str, str]]:
    """The messages, of which each has a role and a text, in the words of `Chat`."""
    checked = []
    for message in messages:
        names = ("from", "value") if isinstance(message, dict) and "from" in message else ("role", "content")
        if not isinstance(message, dict) or not {*names} <= message.keys():
            raise UserError(f'{where}: found the message {quote(message)}; needed: "role" and "content" [P103]')
        role, text = (message[name] for name in names)
        role = _SPEAKERS.get(role, role) if isinstance(role, str) else role
        if role not in _ROLES:
            raise UserError(f"{where}: found the role {quote(role)}; allowed: {', '.join(_ROLES)}")
        if not isinstance(text, str) or not text.strip() or _HALF.search(text):
            raise UserError(
                f"{where}: the {role}'s content is {quote(text)}; needed: a text that is not empty, without half of a "
                "surrogate pair, such as \\ud83d alone [P103]"
            )
        checked.append({"role": role, "content": text})
    return checked


# ---- Tokens ----------------------------------------------------------------------------------------------------------


def encode(
    chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[dict[str, list[int]]], int, int]:
    """Tokenizes chats and cuts each after `max_length` tokens, but a plain text into parts. A tokenizer without a chat
    template gets one for chats.

    TRL's own tokenisation would include in the loss the line break that a template puts after an answer.

    Returns:
        Rows of input_ids and labels of equal length, which TRL takes as they are; the number of answers that were cut;
        the number of chats that were left out because their prompt leaves no room for an answer.
    """
    if not all(chat.is_text for chat in chats):
        give_template(tokenizer)
    rows, cut, left_out = [], 0, 0
    for chat in chats:
        prompt, answer = (
            tokenizer(text, add_special_tokens=False).input_ids for text in prompt_and_answer(chat, tokenizer)
        )
        ids, labels = prompt + answer, [IGNORED] * len(prompt) + answer
        # Parts of a text share a token, which is predicted in one and the first of the next.
        starts = range(0, len(ids) - 1, max(max_length - 1, 1)) if chat.is_text else (0,)
        if len(prompt) >= max_length:
            left_out += 1
            continue
        cut += not chat.is_text and len(ids) > max_length
        rows += [
            {"input_ids": ids[start : start + max_length], "labels": labels[start : start + max_length]}
            for start in starts
        ]
    if not rows:
        raise UserError(f"no prompt of {len(chats)} is shorter than --max-length {max_length} tokens; raise it")
    return rows, cut, left_out


def batches_of(file: str, examples: int, model: str | Path, columns: Mapping[str, str] | None = None) -> list[Any]:
    """The first chats of a file as a model reads them, for a calibration: input_ids [1, tokens] each."""
    import torch

    from pissa.containers.checkpoint import ModelFolder

    with user_errors(OSError, ValueError, before=f"{model}: a calibration needs its tokenizer: "):
        tokenizer = ModelFolder.open(model).tokenizer()
    give_template(tokenizer)
    texts = ["".join(prompt_and_answer(chat, tokenizer)) for chat in read_chats(records(file, columns))[:examples]]
    longest = min(tokenizer.model_max_length, 2048)
    tokens = [tokenizer(text, add_special_tokens=False).input_ids[:longest] for text in texts]
    return [torch.tensor([row]) for row in tokens]


_LINES = 12
"""The most lines that `shown` returns."""


def shown(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """An encoded chat, or the messages of a preference, as the model reads it: what it is given, and what it learns."""
    if "labels" in row:
        given = row["labels"].count(IGNORED)
        tokens = {"given": row["input_ids"][:given], "learned": row["input_ids"][given:]}
        parts = {label: tokenizer.decode(ids) for label, ids in tokens.items()}
    else:
        parts = {}
        for label in ("chosen", "rejected"):
            parts["given"], parts[label] = prompt_and_answer(Chat("", row["prompt"] + row[label]), tokenizer)
    parts = {label: text for label, text in parts.items() if text}
    return "\n".join(as_rows(label, text, _LINES // len(parts)) for label, text in parts.items())


def question_of(row: Mapping[str, Any]) -> list[int]:
    """The tokens of the question of an encoded row; of a plain text, which has at most a start token, none."""
    given = row["labels"].count(IGNORED)
    return row["input_ids"][:given] if given > 1 else []


_FEW = 200
"""Fewer examples than this do not teach facts."""


def note_on_facts(rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What to say where somebody may expect that facts are learned: of few rows, most of whose answers are long, and
    nearly all of which differ."""
    if len(rows) >= _FEW or "labels" not in rows[0]:
        return None
    questions = [len(question_of(row)) for row in rows]
    answers = [tokenizer.decode(row["input_ids"][given:]) for row, given in zip(rows, questions, strict=True) if given]
    long = sum(not are_short([answer]) for answer in answers)
    if 2 * long <= len(rows) or len({*answers}) < 0.9 * len(answers):
        return None
    return (
        f"{len(rows)} long answers teach how to answer, but hardly any facts: give facts with the question, such as by "
        "pissa chat RUN --system TEXT"
    )
