"""Training data: each record of a file becomes a chat that ends with the assistant's answer, or two such chats."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pissa.cli.sources import GSM_SYMBOLIC, gsm_symbolic
from pissa.cli.terminal import UserError, told
from pissa.files.messages import shown

_PAIRS = (("question", "answer"), ("prompt", "completion"))
_ROLES = ("system", "user", "assistant")
_ALLOWED = (
    'allowed: an object with "question" and "answer", with "prompt" and "completion", or with "messages": '
    '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
)
_PREFERENCES = (
    'allowed: an object with "prompt", "chosen" and "rejected", each a text or messages: '
    '[{"role": "user", "content": "..."}]'
)


_HALF = re.compile("[\ud800-\udfff]")
"""What JSON can spell, and no tokenizer takes."""


class Chat(NamedTuple):
    """Messages, {"role", "content"} each, the last one the assistant's; and `where` they stand, for error messages."""

    where: str
    messages: list[dict[str, str]]


def is_records(source: str) -> bool:
    """Whether `source` is a file of records, or the built-in data; else it is a data set."""
    return source == GSM_SYMBOLIC or Path(source).suffix in (".json", ".jsonl")


def read_preferences(source: str) -> list[tuple[Chat, Chat]]:
    """Reads a file of preferences: chats that differ in their answers, the chosen one first.

    Raises:
        UserError: naming file and line, what was found and what is allowed.
    """
    if not Path(source).is_file():
        raise UserError(f"{source}: no such file; allowed: a .jsonl or .json file")
    return [_preference(where, value) for where, value in _values(Path(source), _PREFERENCES)]


def _preference(where: str, value: Any) -> tuple[Chat, Chat]:
    if not isinstance(value, dict) or not {"prompt", "chosen", "rejected"} <= value.keys():
        found = f"an object with {_keys(value)}" if isinstance(value, dict) else _kind(value)
        raise UserError(f"{where}: found {found}; {_PREFERENCES}")
    _check_no_images(where, value)

    def messages(name: str, role: str) -> Any:
        given = value[name]
        return given if isinstance(given, list) else [{"role": role, "content": _text(where, name, given)}]

    prompt = messages("prompt", "user")
    chosen, rejected = (
        Chat(where, _checked_messages(where, [*prompt, *messages(name, "assistant")]))
        for name in ("chosen", "rejected")
    )
    return chosen, rejected


def read_chats(source: str, seed: int) -> list[Chat]:
    """Reads a file, or generates the built-in data.

    Args:
        source: path of a .jsonl or .json file, or "gsm-symbolic".
        seed: of the built-in data.

    Raises:
        UserError: naming file and line, what was found and what is allowed.
    """
    path = Path(source)
    if path.is_file():
        return [Chat(where, _messages(where, value)) for where, value in _values(path, _ALLOWED)]
    if source == GSM_SYMBOLIC:
        return [Chat(f"{source}:{i}", _messages(source, value)) for i, value in enumerate(gsm_symbolic(seed), 1)]
    found = "is a folder" if path.is_dir() else "no such file"
    raise UserError(f"{source}: {found}; allowed: a .jsonl or .json file, or the built-in {GSM_SYMBOLIC}")


def _values(path: Path, allowed: str) -> Iterator[tuple[str, Any]]:
    """Yields each JSON value of the file with its place."""
    with told(OSError, ValueError, before=f"{path}: cannot be read: ", after="; allowed: a text file in UTF-8"):
        text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        raise UserError(f"{path}: is empty; needed: at least one record")
    if path.suffix == ".json":
        values = _parse(str(path), text, allowed)
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: found {_kind(values)}; needed in a .json file: a list of records")
        yield from ((f"{path}: record {number}", value) for number, value in enumerate(values, 1))
        return
    # Not splitlines(): a JSON string may hold U+2028, which would end a line there.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _parse(f"{path}:{number}", line, allowed)


def _parse(where: str, text: str, allowed: str) -> Any:
    with told(
        ValueError, RecursionError, before=f"{where}: not JSON: ", after=f"; found {_shortened(text)}; {allowed}"
    ):
        return json.loads(text)


def _messages(where: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: found {_kind(value)}; {_ALLOWED}")
    _check_no_images(where, value)
    if "messages" in value:
        return _checked_messages(where, value["messages"])
    for asked, answered in _PAIRS:
        if asked in value and answered in value:
            return [
                {"role": "user", "content": _text(where, asked, value[asked])},
                {"role": "assistant", "content": _text(where, answered, value[answered])},
            ]
    raise UserError(f"{where}: found an object with {_keys(value)}; {_ALLOWED}")


def _check_no_images(where: str, value: dict[str, Any]) -> None:
    if name := next((name for name in ("image", "images") if value.get(name)), None):
        raise UserError(
            f'{where}: found "{name}"; a file of records is text alone; allowed: as --data a folder of the images with '
            'metadata.jsonl, whose rows name theirs in "file_name" or "images_file_names", or another data set with a '
            f'column "{name}"'
        )


def _keys(value: dict[str, Any]) -> str:
    return f"the keys {', '.join(map(shown, value)) or 'none'}"


def _checked_messages(where: str, messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list):
        raise UserError(f'{where}: "messages" is {_kind(messages)}; {_ALLOWED}')
    checked = []
    for i, message in enumerate(messages):
        name = f"messages[{i}]"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f'{where}: {name} is {shown(message)}; needed: "role" and "content"')
        if message["role"] not in _ROLES:
            raise UserError(f"{where}: {name} has the role {shown(message['role'])}; allowed: {', '.join(_ROLES)}")
        checked.append({"role": message["role"], "content": _text(where, f'{name}["content"]', message["content"])})
    if [message["role"] for message in checked[-2:]] != ["user", "assistant"]:
        roles = ", ".join(message["role"] for message in checked) or "none"
        raise UserError(f'{where}: the roles of "messages" are: {roles}; needed: the last two are user, assistant')
    return checked


def _text(where: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} is {_kind(value)}; needed: a string")
    if not value.strip():
        raise UserError(f"{where}: {name} is empty; needed: text")
    if _HALF.search(value):
        raise UserError(
            f"{where}: {name} holds half of a surrogate pair, such as \\ud83d alone; needed: whole characters"
        )
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    kind = names.get(type(value), "a number")
    return f"an empty {kind.split()[-1]}" if value in ([], {}) else kind


def _shortened(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 60 else text[:57] + "..."
