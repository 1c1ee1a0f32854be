"""Files of results: where they were measured, and a line for each row."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
