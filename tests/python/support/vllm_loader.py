"""vLLM's own loader of LoRAs, out of its wheel, without its engine: four of its modules, and stubs of what they import
beside torch. PISSA_VLLM_WHEEL names the wheel (`pip download --no-deps vllm`)."""

from __future__ import annotations

import ast
import importlib
import logging
import os
import sys
import types
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, ClassVar

import pytest

WHEEL = "PISSA_VLLM_WHEEL"

_OWN = ("vllm.lora.peft_helper", "vllm.lora.lora_weights", "vllm.lora.lora_model", "vllm.lora.utils")


class _Stub(types.ModuleType):
    """A module that has any name, as a class. Nothing computes with them but the two here."""

    __path__: ClassVar[list[str]] = []
    PIN_MEMORY = False

    @staticmethod
    def init_logger(name: str) -> logging.Logger:
        logger = logging.getLogger(name)
        logger.info_once = logger.info  # type: ignore[attr-defined]
        return logger

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder(MetaPathFinder, Loader):
    def __init__(self, wheel: zipfile.ZipFile) -> None:
        self._wheel = wheel

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.partition(".")[0] == "vllm" else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType | None:
        return None if spec.name in _OWN else _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ in _OWN:
            name = module.__name__.replace(".", "/") + ".py"
            exec(compile(self._wheel.read(name), name, "exec"), vars(module))


@contextmanager
def vllm_loader() -> Iterator[types.SimpleNamespace]:
    """PEFTHelper, LoRAModel, PackedLoRALayerWeights and the ranks that the engine allows. It skips the test where the
    wheel is missing."""
    path = os.environ.get(WHEEL)
    if not path or not Path(path).is_file():
        pytest.skip(f"{WHEEL} does not name vLLM's wheel: pip download --no-deps vllm")
    with zipfile.ZipFile(path) as wheel:
        finder = _Finder(wheel)
        sys.meta_path.insert(0, finder)
        had_regex = "regex" in sys.modules
        sys.modules.setdefault("regex", importlib.import_module("re"))
        try:
            yield types.SimpleNamespace(
                PEFTHelper=importlib.import_module(_OWN[0]).PEFTHelper,
                PackedLoRALayerWeights=importlib.import_module(_OWN[1]).PackedLoRALayerWeights,
                LoRAModel=importlib.import_module(_OWN[2]).LoRAModel,
                ranks=_ranks(wheel.read("vllm/config/lora.py")),
            )
        finally:
            sys.meta_path.remove(finder)
            for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
                del sys.modules[name]
            if not had_regex:
                del sys.modules["regex"]


def _ranks(source: bytes) -> tuple[int, ...]:
    """The values of MaxLoRARanks."""
    (node,) = (node for node in ast.parse(source).body if "MaxLoRARanks" in ast.unparse(node)[:12])
    return tuple(ast.literal_eval(node.value.slice))  # type: ignore[attr-defined]
