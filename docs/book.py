"""Sphinx's extension for this book: the contents are the links of docs/index.md, and earlier addresses lead on.

All pages are plain Markdown, which is read on GitHub, too. So the index has lists of links instead of `toctree`s, and
the book's source is the repository: a relative link leads to the same page in both.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

INDEX = "docs/index"
PARENTS = ("docs/evidence", "docs/speed")
"""Pages below which those stand that they link to in bench/."""
MESSAGES = "docs/troubleshooting"
"""Its contents at the side have the sections, without the messages."""

# Pages that have moved, by their earlier addresses in the book.
MOVED = {
    "PROTOCOL": "bench/experiments/PROTOCOL",
    "claims": "bench/experiments/README",
    "converting": "docs/use",
    "developers": "CONTRIBUTING",
    "experts": "docs/released-models",
    "faq": "docs/troubleshooting",
    "glossary": "docs/how-it-works",
    "limits": "docs/install",
    "paper": "bench/recipes/README",
    "preferences": "docs/trainers",
    "qpissa": "docs/choices",
    "serving": "docs/use",
    "situations": "bench/situations",
    "variants": "docs/from-peft",
}

_REDIRECT = """\
<!DOCTYPE html>
<meta charset="utf-8">
<meta http-equiv="refresh" content="0; url={to}">
<link rel="canonical" href="{to}">
<a href="{to}">This page has moved.</a>
"""


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", add_contents)
    app.connect("build-finished", write_redirects)
    return {"parallel_read_safe": True}


def add_contents(app: Sphinx, name: str, source: list[str]) -> None:
    """Appends a hidden `toctree` for each section of the index, of the pages that its list links to, or one for the
    pages below a parent, and limits the contents of a page."""
    if name == INDEX:
        for section in re.split(r"^## ", source[0], flags=re.MULTILINE)[1:]:
            caption, _, text = section.partition("\n")
            source[0] += _toctree(re.findall(r"\]\(([^)#]+)\.md\)", text), f":caption: {caption}")
    elif name == MESSAGES:
        source[0] = f"---\ntocdepth: 2\n---\n\n{source[0]}"
    elif name in PARENTS:
        source[0] += _toctree(list(dict.fromkeys(re.findall(r"\]\((\.\./bench/[^)#]+)\.md", source[0]))))


def _toctree(pages: list[str], *options: str) -> str:
    return "\n".join(["", "", "```{toctree}", *options, ":hidden:", "", *pages, "```", ""])


def write_redirects(app: Sphinx, error: Exception | None) -> None:
    """Writes a page for each address that the book had when its source was docs/."""
    if error or app.builder.format != "html":
        return
    addresses = {page.removeprefix("docs/"): page for page in app.env.found_docs if page.startswith("docs/")} | MOVED
    for address, page in addresses.items():
        if page not in app.env.found_docs:
            raise ValueError(f"{address}.html is to lead to {page}, which is no page")
        file = Path(app.outdir) / f"{address}.html"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_REDIRECT.format(to="../" * address.count("/") + f"{page}.html"), encoding="utf-8")
