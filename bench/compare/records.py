"""Files of results, with a line for each row, and with the machine and the packages that they were measured with."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def missing(*packages: str) -> str | None:
    """Why not all of these packages can be used: the first that does not import, whatever it raises. None: they can."""
    for package in packages:
        try:
            importlib.import_module(package)
        except Exception as error:
            return f"{package} does not import ({type(error).__name__}: {error})"
    return None


def machine() -> dict[str, Any]:
    import torch  # here: bench.compare chooses its processors first

    from pissa import build_info

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in reversed(lines)}
    keys = ("model name", "cpu family", "model")
    facts = {key: cpu.get(key, platform.machine()) for key in keys}
    return facts | {"isa": build_info()["isa"], "torch": torch.__version__, "threads": torch.get_num_threads()}


def write(path: Path, record: Mapping[str, Any]) -> None:
    """A JSON object: each of its values is a line, and each element of one that is a list of objects."""

    def text(value: Any) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n" + ",\n".join(map(text, value)) + "\n]"
        return json.dumps(value, ensure_ascii=False)

    path.write_text(
        "{\n" + ",\n".join(f"{json.dumps(name)}: {text(value)}" for name, value in record.items()) + "\n}\n"
    )
