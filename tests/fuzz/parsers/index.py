"""The index of a checkpoint's shards."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from pissa.containers.tensor_file import INDEX, Source

FILE, NAMED = INDEX, ".safetensors"


def parse(folder: Path) -> None:
    if not (folder / "a.safetensors").exists():
        save_file({"one": torch.ones(2)}, folder / "a.safetensors")
        save_file({"two": torch.ones(2)}, folder / "b.safetensors")
    Source(folder)
