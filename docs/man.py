"""Generates the manual page of `pissa` from its parser: `python docs/man.py FILE`, which `make docs` runs."""

from __future__ import annotations

import sys
from pathlib import Path

from argparse_manpage.manpage import Manpage

from pissa.cli import COMMANDS, parser_for


def main() -> None:
    parser = parser_for(COMMANDS)
    page = Manpage(parser)
    page.manual = "pissa"
    page.description = "fine-tune language models on a CPU: LoRA and PiSSA, in 16, 8 or 4 bits"
    # troff would interpret a line of text that begins with a quote as a macro.
    Path(sys.argv[1]).write_text(str(page).replace("\n'", "\n\\(aq"), encoding="utf-8")


if __name__ == "__main__":
    main()
