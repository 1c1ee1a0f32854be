"""Runs a program for run_module of `processes`, and writes how long it took and how much of that was imports.

python -m bench.checkpoints.timed REPORT.json MODULE ARGUMENTS
"""

from __future__ import annotations

import builtins
import importlib
import json
import runpy
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPORT: dict[str, Any] = {}
"""What the program says itself: `note` adds to it."""


def note(**values: Any) -> None:
    """Adds to the report of this process."""
    REPORT.update(values)


class ImportClock:
    """Counts the seconds of imports, wherever a program makes them, in the thread that has made this clock."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = False
        self._thread = threading.get_ident()
        builtins.__import__ = self._timed(builtins.__import__)
        importlib.import_module = self._timed(importlib.import_module)

    def _timed(self, load: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            if self._inside or threading.get_ident() != self._thread:
                return load(*arguments, **options)
            self._inside = True
            begun = time.perf_counter()
            try:
                return load(*arguments, **options)
            finally:
                self._inside = False
                self.seconds += time.perf_counter() - begun

        return timed


def main() -> None:
    sys.modules["bench.checkpoints.timed"] = sys.modules["__main__"]  # runpy replaces __main__; `note` finds this one
    report, module, *arguments = sys.argv[1:]
    clock = ImportClock()
    begun = time.perf_counter()
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    REPORT.update(seconds=time.perf_counter() - begun, imports=clock.seconds)
    Path(report).write_text(json.dumps(REPORT))


if __name__ == "__main__":
    main()
