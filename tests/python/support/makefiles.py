"""The Makefile and the files of mk that it includes."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
FILES = [ROOT / "Makefile", *sorted((ROOT / "mk").glob("*.mk"))]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in FILES)


def targets() -> set[str]:
    """The names that `make` can be given: no files, and no patterns."""
    return set(re.findall(r"^([\w-]+):(?!=)", TEXT, flags=re.MULTILINE))
