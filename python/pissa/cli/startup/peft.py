"""Python finds this module as peft when this folder is on PYTHONPATH, which `pissa run` ensures. When a program imports
peft, this module loads the real one, which replaces it, and enables `pissa.integrations.peft`."""

from __future__ import annotations

import os
import sys
from functools import partial
from importlib import import_module
from typing import Any

INIT = "PISSA_RUN_INIT"
"""The environment variable that holds the start of adapters for which the program chooses none; see
`integrations.peft.enable`."""
FOLDER = os.path.dirname(os.path.abspath(__file__))


def _give_way() -> None:
    place = next(i for i, entry in enumerate(sys.path) if os.path.abspath(entry) == FOLDER)
    entry = sys.path.pop(place)
    del sys.modules["peft"]
    try:
        import_module("peft")
    finally:
        sys.path.insert(place, entry)  # spawned processes begin with this path
    from pissa.integrations import peft

    init: Any = os.environ.get(INIT)
    say = partial(print, "pissa run:", file=sys.stderr, flush=True)
    # Only the first of several processes reports what it takes over.
    notify = say if os.environ.get("RANK", "0") == "0" else None
    peft.enable(notify, init)


if __name__ == "peft":
    _give_way()
