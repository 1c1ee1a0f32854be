"""Python imports this module at its start where the folder is on PYTHONPATH, as `pissa run` sees to. When the program
imports peft, `pissa.integrations.peft` is enabled. Until then nothing but the standard library is imported.

A module of this name that the folder hides is run after it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

INIT = "PISSA_RUN_INIT"
"""The variable that says how adapters start about which the program says nothing; see `integrations.peft.enable`."""
FOLDER = os.path.dirname(os.path.abspath(__file__))


class _AfterPeft(MetaPathFinder):
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
            spec.loader = _Enabling(spec.loader, self)
        return spec


class _Enabling(Loader):
    """peft's loader, and then `enable`."""

    def __init__(self, loader: Loader, finder: MetaPathFinder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path.remove(self.finder)
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        enable()


def enable() -> None:
    """Enables ours. The first of several processes says what it takes over."""
    from pissa.integrations import peft

    init: Any = os.environ.get(INIT)
    peft.enable(_say if os.environ.get("RANK", "0") == "0" else None, init)


def _say(sentence: str) -> None:
    print(f"pissa run: {sentence}", file=sys.stderr, flush=True)


def install() -> None:
    """Sees to it that `enable` is called when peft is there."""
    if "peft" in sys.modules:
        enable()
    else:
        sys.meta_path.insert(0, _AfterPeft())


def _run_hidden() -> None:
    """Runs the module of this name that the rest of the path has."""
    rest = [entry for entry in sys.path if os.path.abspath(entry) != FOLDER]
    spec = PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    install()
    _run_hidden()
