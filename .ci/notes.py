"""Prints a version's section of CHANGELOG.md, the notes of its release: python3 .ci/notes.py 0.1.0"""

import re
import sys
from pathlib import Path

TEXT = (Path(__file__).parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")


def notes(version: str) -> str:
    found = re.search(rf"^## {re.escape(version)} \([^\n]*\)\n+(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    if found is None:
        sys.exit(f"CHANGELOG.md has no section '## {version} (...)'")
    return found[1].rstrip()


if __name__ == "__main__":
    print(notes(sys.argv[1]))
