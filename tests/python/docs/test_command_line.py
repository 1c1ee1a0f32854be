"""The reference of the command line is that of the parsers, and the pages name only options that exist."""

from __future__ import annotations

import argparse
import re
import shlex
from importlib.metadata import version
from pathlib import Path

import pytest

import pages
from pissa.cli import COMMANDS, parser_for

PAGE = pages.ROOT / "docs" / "command-line.md"
PARSER = parser_for(COMMANDS)
PARSERS = next(action for action in PARSER._actions if isinstance(action, argparse._SubParsersAction)).choices
OPTIONS = {option for parser in PARSERS.values() for option in parser._option_string_actions}

# Options of other programs that a page names alone.
OTHERS = {"--max-lora-rank", "--lora", "--config-settings", "--no-build-isolation"}


@pytest.fixture(scope="module")
def text() -> str:
    """The page. It lists options of TRL and of transformers, too."""
    text = PAGE.read_text(encoding="utf-8")
    if f"TRL {version('trl')} and transformers {version('transformers')}" not in text:
        pytest.skip("the page was made with other releases of TRL and transformers")
    return text


def test_the_page_is_that_of_the_parsers(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(pages.ROOT / "docs")
    import command_line

    assert text == command_line.page(), "run `PYTHONPATH=python python docs/command_line.py`"


def test_every_option_of_every_parser_is_on_the_page(text: str) -> None:
    sections = {part.partition("\n")[0]: part for part in re.split("^## pissa ", text, flags=re.MULTILINE)}
    sections["dpo"] += sections["finetune"]  # it says only what differs
    for name, parser in PARSERS.items():
        named = set(re.findall(r"`(--[\w-]+)`", sections[name])) | {"--help"}
        missing = [action.option_strings for action in parser._actions if action.option_strings]
        assert [strings for strings in missing if named.isdisjoint(strings)] == [], name


@pytest.mark.parametrize("page", [page for page in pages.PAGES if page != PAGE], ids=pages.name_of)
def test_every_option_on_a_page_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    commands = [line for block in pages.blocks(page) for line in block.text.replace("\\\n", "").splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    wrong = []
    for words in map(_words, [*commands, *spans]):
        match words:
            case ["pissa", name, *_] if name in PARSERS:
                known = set(PARSERS[name]._option_string_actions)
            case [first, *_] if first.startswith("--"):
                known = OPTIONS | OTHERS
            case _:
                continue
        for word in words[: words.index("--") if "--" in words else None]:
            option = word.partition("=")[0]
            if re.fullmatch(r"--[a-z][\w-]*", option) and option not in known:
                wrong.append(" ".join(words))
    assert wrong == []


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a quote in a sentence
        return []
