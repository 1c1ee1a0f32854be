"""Python imports this module at its start where the folder is on PYTHONPATH, as `pissa run` sees to. When the program
imports peft, `pissa.integrations.peft` is enabled. Until then nothing but the standard library is imported.

A module of this name that the folder hides is run after it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

INIT = "PISSA_RUN_INIT"
"""The variable that says how adapters start about which the program says nothing; see `integrations.peft.enable`."""
FOLDER = os.path.dirname(os.path.abspath(__file__))


class _EnableAfterPeft(MetaPathFinder):
    """Finds peft, as often as somebody asks whether it is there, with a loader that enables ours afterwards."""

    is_asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft" or self.is_asking:
            return None
        self.is_asking = True
        try:
            spec = find_spec(fullname)
        finally:
            self.is_asking = False
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_enable(module: ModuleType) -> None:
                load(module)
                _enable()

            spec.loader.exec_module = load_and_enable  # type: ignore[method-assign]
        return spec


def _enable() -> None:
    """Enables ours. The first of several processes says what it takes over."""
    from pissa.integrations import peft

    init: Any = os.environ.get(INIT)
    peft.enable(_say if os.environ.get("RANK", "0") == "0" else None, init)


def _say(sentence: str) -> None:
    print(f"pissa run: {sentence}", file=sys.stderr, flush=True)


def _run_hidden() -> None:
    """Runs the module of this name that the rest of the path has."""
    rest = [entry for entry in sys.path if os.path.abspath(entry) != FOLDER]
    spec = PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, _EnableAfterPeft())
    _run_hidden()
