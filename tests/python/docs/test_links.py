"""Links of the README lead somewhere. Those of the book are Sphinx's to check."""

from __future__ import annotations

import re

import pages


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)]+)\)", (pages.ROOT / "README.md").read_text())
    files = [link for link in links if not link.startswith("https://")]
    assert len(files) > 10
    assert [link for link in files if not (pages.ROOT / link).is_file()] == []
