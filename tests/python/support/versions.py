"""The table of what was tested, in docs/install.md: `python tests/python/support/versions.py COMMAND` writes the
row of the Python that runs it, after COMMAND has passed there. `.ci/run` does so; the
rows of other versions of Python stay."""

from __future__ import annotations

import platform
import re
import sys
from importlib import metadata
from pathlib import Path

import pissa

PAGE = Path(__file__).parents[3] / "docs" / "install.md"
BEGIN, END = "<!-- versions -->", "<!-- /versions -->"
HEAD = "| Python | torch | PEFT | transformers | compiler | system | command |\n|---|---|---|---|---|---|---|"


def row(command: str) -> str:
    """What is installed here, versions without the builds that they may name after a "+"."""
    installed = (metadata.version(name).split("+")[0] for name in ("torch", "peft", "transformers"))
    compiler = pissa.build_info()["compiler"].replace("GNU", "GCC")
    system = platform.freedesktop_os_release()["PRETTY_NAME"]
    cells = [platform.python_version(), *installed, compiler, system, f"`{command}`"]
    return f"| {' | '.join(cells)} |"


def with_row(page: str, row: str) -> str:
    """`page` with the row in its table, in place of that of the same version of Python (3.x)."""
    begin, end = page.index(BEGIN), page.index(END)
    rows = {minor(line): line for line in [*re.findall(r"^\| \d.*", page[begin:end], flags=re.MULTILINE), row]}
    table = "\n".join([BEGIN, "", HEAD, *(rows[key] for key in sorted(rows)), "", ""])
    return page[:begin] + table + page[end:]


def minor(row: str) -> tuple[int, ...]:
    """(3, 13) of a row that begins with 3.13.5."""
    return tuple(map(int, row.split()[1].split(".")[:2]))


if __name__ == "__main__":
    PAGE.write_text(with_row(PAGE.read_text(), row(sys.argv[1])))
