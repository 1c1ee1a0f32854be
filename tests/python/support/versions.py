"""A row of the table of what was tested, in docs/releases.md: `python tests/python/support/versions.py COMMAND` prints
that of the Python that runs it, after COMMAND has passed there. `.ci/run` does so; a release puts it into the page."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

import pissa


def row(command: str) -> str:
    """What is installed here, versions without the builds that they may name after a "+"."""
    installed = (metadata.version(name).split("+")[0] for name in ("torch", "peft", "transformers"))
    compiler = pissa.build_info()["compiler"].replace("GNU", "GCC")
    system = platform.freedesktop_os_release()["PRETTY_NAME"]
    cells = [platform.python_version(), *installed, compiler, system, f"`{command}`"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(row(sys.argv[1]))
