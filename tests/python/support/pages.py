"""The pages that users read, and the blocks of code on them."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[3]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The pages' name of the Hub, for which tests have a small model in a folder `base`."""
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


class Block(NamedTuple):
    """A fenced block."""

    language: str
    """As it is written: "" if none is."""
    text: str


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """Without directives of Sphinx, whose fences name them in braces."""
    found, lines = [], iter(page.read_text(encoding="utf-8").splitlines(keepends=True))
    for line in lines:
        if line.startswith("```"):
            text = "".join(takewhile(lambda inner: inner.rstrip() != "```", lines))
            found.append(Block(line[3:].strip(), text))
    return [block for block in found if not block.language.startswith("{")]
