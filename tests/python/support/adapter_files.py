"""What two folders of adapters have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from pissa.base.digest import xxh3


def content(folder: Path) -> dict[str, Any]:
    """The tensors of an adapter, by their digests, and its record without what depends on where it was saved: the rest
    of the base, of which sharded tensors are left out, and the name of the base."""
    record = json.loads((folder / "pissa.json").read_text())
    for name in ("xxh3", "rest"):
        del record[name]
    record["config"].pop("base_model_name_or_path", None)
    found = {"record": record}
    for name in ("adapter_model", "pissa"):
        found[name] = {key: xxh3(value) for key, value in load_file(folder / f"{name}.safetensors").items()}
    return found
