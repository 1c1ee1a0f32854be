"""MATH (Hendrycks et al. 2021): 12 500 problems of competitions, whose solutions have the answer in a \\boxed{}."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pissa.cli.data import Chat
from pissa.cli.terminal import UserError, told

_NEEDED = ("problem", "solution")
_ALLOWED = (
    "allowed: a folder with test.jsonl, each line an object with problem, solution, level and type, or the original "
    "release's folder MATH with test/SUBJECT/NUMBER.json"
)


def read_math(folder: Path) -> list[Chat]:
    """Reads the test problems, in the order of the file, or of subjects and numbers. An answer is the whole solution.

    Raises:
        UserError: there are no such files, or one is not what it should be; it says which.
    """
    lines = folder / "test.jsonl"
    if lines.is_file():
        texts = [(f"{lines}:{number}", text) for number, text in enumerate(_read(lines).split("\n"), 1) if text.strip()]
    else:
        files = sorted((folder / "test").glob("*/*.json"), key=lambda file: (file.parent.name, _number(file)))
        texts = [(str(file), _read(file)) for file in files]
    if not texts:
        raise UserError(f"{folder}: found no problem; {_ALLOWED}")
    return [_chat(where, text) for where, text in texts]


def _read(file: Path) -> str:
    with told(OSError, ValueError, before=f"{file}: cannot be read: ", after="; allowed: a text file in UTF-8"):
        return file.read_text(encoding="utf-8")


def _number(file: Path) -> tuple[int, str]:
    return (int(file.stem) if file.stem.isdecimal() else -1, file.stem)


def _chat(where: str, text: str) -> Chat:
    with told(ValueError, before=f"{where}: not JSON: ", after=f"; {_ALLOWED}"):
        value: Any = json.loads(text)
    if not isinstance(value, dict) or not all(isinstance(value.get(name), str) for name in _NEEDED):
        raise UserError(f"{where}: found {text[:60]!r}; needed: an object with the texts problem and solution")
    return Chat(
        where,
        [{"role": "user", "content": value["problem"]}, {"role": "assistant", "content": value["solution"]}],
    )
