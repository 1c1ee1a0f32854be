"""Links of README and of all pages lead to a file and to one of its headings, as GitHub reads them. Sphinx checks those
of the book once more, with what it includes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pages

BENCH = ("README.md", "speed.md", "situations.md", "recipes/README.md", "experiments/README.md")
PAGES = [
    *pages.PAGES,
    *(pages.ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *(pages.ROOT / "bench" / name for name in BENCH),
]
GENERATED = re.compile(r"#pissa\.[\w.]+")  # names that Sphinx describes on the page itself


@pytest.mark.parametrize("page", PAGES, ids=pages.name_of)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", _text(page)):
        file, _, heading = link.partition("#")
        if re.match(r"https?:|mailto:", link) or GENERATED.fullmatch(link):
            continue
        target = (page.parent / file) if file else page
        if not target.exists() or (heading and heading not in headings(target)):
            dead.append(link)
    assert dead == []


def headings(page: Path) -> set[str]:
    """The addresses of a page's headings: lower case, without what is no letter, digit, hyphen or space."""
    titles = re.findall(r"^#+ (.*)$", _text(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _text(page: Path) -> str:
    """Without blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_every_page_is_in_the_index() -> None:
    index = (pages.ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = {(pages.ROOT / "docs" / link).resolve() for link in re.findall(r"\]\(([^)#]+\.md)\)", index)}
    unlisted = {pages.ROOT / "docs" / name for name in ("index.md", "pypi.md")}
    assert set((pages.ROOT / "docs").rglob("*.md")) - unlisted - linked == set()
