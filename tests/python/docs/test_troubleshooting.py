"""docs/troubleshooting.md quotes messages as the sources have them, and names every warning.

A message is a heading of the third level in backquotes, or in backquotes in a paragraph that begins with "Also:". In it
an ellipsis, …, stands for what varies. The name of a class of `pissa.notices` may precede it, as Python prints it.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pissa import notices

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
WARNINGS = {name for name, kind in inspect.getmembers(notices, inspect.isclass) if issubclass(kind, Warning)}

VARIES = "\0"
"""In the texts of the sources, what is put in when they run."""


def quoted(page: str) -> list[tuple[str, str]]:
    """The messages of a page: the name of the warning's class, or "", and the text."""
    found = []
    for entry in re.findall(r"^### (`[^\n]*`)$|^Also: (.*?)\n\n", page, flags=re.DOTALL | re.MULTILINE):
        for _, message in re.findall(r"(`+)(.+?)\1(?!`)", "".join(entry), flags=re.DOTALL):
            name, _, text = message.strip().partition(": ")
            found.append((name, text) if name in WARNINGS else ("", message.strip()))
    return found


def in_python(source: str) -> Iterator[str]:
    """The strings of a module, each whole however many lines it has, without docstrings."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else VARIES for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def in_cpp(source: str) -> Iterator[str]:
    """The strings of each statement, joined: what stands between two is put in."""
    text, end = "", 0
    for token in re.finditer(r'//[^\n]*|\'(?:\\.|[^\\\'])\'|"((?:\\.|[^"\\\n])*)"', source):
        if token[1] is None:
            continue
        between = source[end : token.start()]
        if re.search(r"[;{}]", between):
            yield text
            text = ""
        text += (VARIES if text and between.strip() else "") + token[1].replace('\\"', '"')
        end = token.end()
    yield text


def in_make(source: str) -> Iterator[str]:
    """What `echo` says, or CMake's message()."""
    for said in re.findall(r'(?:echo|message\(FATAL_ERROR) ((?:"[^"]*"\s*)+)', source):
        yield re.sub(r"\$(?:\([^)]*\)|{[^}]*})", VARIES, "".join(re.findall(r'"([^"]*)"', said)))


@cache
def texts() -> list[str]:
    """All strings that can be a message, or part of one."""
    readers = {
        in_python: sorted((ROOT / "python" / "pissa").rglob("*.py")),
        in_cpp: [path for path in sorted((ROOT / "cpp" / "pissa").rglob("*")) if path.suffix in (".h", ".cc", ".cu")],
        in_make: [ROOT / "Makefile", ROOT / "CMakeLists.txt", *sorted((ROOT / "cpp" / "cmake").glob("*.cmake"))],
    }
    return [text for reader, paths in readers.items() for path in paths for text in reader(path.read_text())]


def is_in(message: str, text: str) -> bool:
    """Whether the parts of the message between its ellipses are in a text, in order."""
    place = 0
    for part in map(str.strip, message.split("…")):
        if (found := text.find(part, place)) < 0:
            return False
        place = found + len(part)
    return True


def test_every_message_is_one_of_the_sources() -> None:
    messages = [text for _, text in quoted(PAGE)]
    assert len(messages) > 100  # the markup is as it was
    assert [message for message in messages if not any(is_in(message, text) for text in texts())] == []


def test_every_warning_has_an_entry() -> None:
    assert {name for name, _ in quoted(PAGE)} - {""} == WARNINGS - {"PissaWarning"}
    assert "`pissa.notices.PissaWarning`" in PAGE
