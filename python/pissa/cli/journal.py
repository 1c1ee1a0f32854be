"""Answers on the disk as soon as they are given, so that a command that was killed goes on with the others."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pissa.cli.terminal import UserError, count_of, user_errors


class Answer(NamedTuple):
    """An answer, and what has ended it besides the model: a word, or nothing."""

    text: str
    ended_by: str = ""


class Journal:
    """A file beside the one that is to be written: a line that says what was asked, and one for each answer.

    Args:
        path: of the file that is to be written.
        asked: by names that a message can use, everything on which answers depend.

    Raises:
        UserError: there are answers to something else.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any]) -> None:
        self.path = path.with_name(f"{path.name}.part")
        self.answers: dict[int, Answer] = {}
        """The answers by the places of their rows."""
        self._asked = {"version": 1, **asked}
        with user_errors(OSError, before="the answers cannot be kept: "):
            lines = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []
            complete = [line for line in lines if line.endswith(b"\n")]  # a kill leaves part of the last one
            self._read(complete)
            if lines:
                os.truncate(self.path, sum(map(len, complete)))

    def _read(self, lines: list[bytes]) -> None:
        if not lines:
            return
        instead = "give the command as it was to go on with it, remove the file, or choose another --out [P145]"
        with user_errors(ValueError, TypeError, before=f"{self.path}: is no file of answers: ", after=f"; {instead}"):
            before, *rows = map(json.loads, lines)
            changed = [name for name, value in self._asked.items() if before.get(name) != value]
            self.answers = {row: Answer(*answer) for row, *answer in rows}
        if changed:
            kept = count_of(len(self.answers), "answer")
            raise UserError(f"{self.path}: has {kept} with another {', '.join(changed)}; {instead}")

    def add(self, row: int, answer: Answer) -> None:
        """Keeps an answer, whatever happens to this process."""
        self.answers[row] = answer
        with (
            user_errors(OSError, before="the answers cannot be kept: "),
            open(self.path, "a", encoding="utf-8", newline="\n") as file,
        ):
            if file.tell() == 0:
                file.write(f"{json.dumps(self._asked)}\n")
            file.write(f"{json.dumps([row, *answer])}\n")

    def remove(self) -> None:
        """Removes the file, once the other one has been written."""
        self.path.unlink(missing_ok=True)  # a table without rows that ask
