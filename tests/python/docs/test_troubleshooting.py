"""docs/troubleshooting.md has an entry for each code that a message ends with, such as [P012], and names every warning.

An entry is a heading of the third level with a text in backquotes: its code, if it has one, and what its message says.
In it an ellipsis, …, stands for what varies. A warning has its class in place of a code, and what the build says has
neither.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import makefiles
from pissa import notices

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
WARNINGS = {name for name, kind in inspect.getmembers(notices, inspect.isclass) if issubclass(kind, Warning)}

VARIES = "\0"
"""In the texts of the sources, what is put in when they run."""


def entries(page: str) -> list[tuple[str, str]]:
    """The entries of a page: the code, the class of the warning, or "", and the text."""
    found = []
    for code, _, message in re.findall(r"^### (?:(\S+) )?(`+)([^\n]+?)\2$", page, flags=re.MULTILINE):
        name, _, text = message.strip().partition(": ")
        found.append((name, text) if name in WARNINGS else (code, message.strip()))
    return found


def in_python(source: str) -> Iterator[str]:
    """The strings of a module, each whole however many lines it has, without docstrings."""
    tree = ast.parse(source)
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    skipped |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else VARIES for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
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
def texts() -> dict[Path, list[str]]:
    """All strings of each file that can be a message, or part of one."""
    readers = {
        in_python: sorted((ROOT / "python" / "pissa").rglob("*.py")),
        in_cpp: [path for path in sorted((ROOT / "cpp" / "pissa").rglob("*")) if path.suffix in (".h", ".cc", ".cu")],
        in_make: [*makefiles.FILES, ROOT / "CMakeLists.txt", *sorted((ROOT / "cpp" / "cmake").glob("*.cmake"))],
    }
    return {path: list(reader(path.read_text())) for reader, paths in readers.items() for path in paths}


def codes(*parts: str) -> list[str]:
    return [code for part in parts for code in re.findall(r"\[(P\d+)\]", part)]


def is_in(message: str, text: str) -> bool:
    """Whether the parts of the message between its ellipses are in a text, in order."""
    place = 0
    for part in map(str.strip, message.split("…")):
        if (found := text.find(part, place)) < 0:
            return False
        place = found + len(part)
    return True


def says(file: list[str], code: str, message: str) -> bool:
    """Whether a file has a message with this code, whole or in parts, of which the last has the code."""
    own = [text for text in file if is_in(message, text)]
    return any(code in codes(text) for text in own) or (code in codes(*file) and any(not codes(text) for text in own))


def test_every_code_has_one_entry_and_every_entry_a_message() -> None:
    named = [code for code, _ in entries(PAGE) if code and code not in WARNINGS]
    raised = {code for file in texts().values() for code in codes(*file)}
    assert len(named) > 100  # the markup is as it was
    assert sorted(named) == sorted(raised)


def test_a_code_is_at_the_end_of_a_message_or_of_a_sentence_of_it() -> None:
    with_codes = [text for file in texts().values() for text in file if codes(text)]
    assert [text for text in with_codes if not re.search(r"(?:^|\S) \[P\d{3}\](?:$|\. )", text)] == []
    assert [text for text in with_codes if len(codes(text)) > 1] == []


def test_every_heading_is_what_a_message_says() -> None:
    wrong = []
    for name, message in entries(PAGE):
        if name and name not in WARNINGS:
            found = any(says(file, name, message) for file in texts().values())
        else:
            found = any(is_in(message, text) and not codes(text) for file in texts().values() for text in file)
        if not found:
            wrong.append(f"{name} {message}")
    assert wrong == []


def test_every_warning_has_an_entry() -> None:
    assert {name for name, _ in entries(PAGE) if name in WARNINGS} == WARNINGS - {"PissaWarning"}
    assert "`pissa.notices.PissaWarning`" in PAGE
