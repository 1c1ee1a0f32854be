"""Codes of released models in a checkpoint's file: which tensors make a weight, and whether they fit each other."""

from __future__ import annotations

from pathlib import Path

import torch

from pissa import ops
from pissa.containers.released_codes import DecodedSource
from pissa.containers.tensor_file import Source

FILE, HEADER = "model.safetensors", 8


def parse(folder: Path) -> None:
    with DecodedSource(folder) as source, Source(folder) as raw:
        for name in source.names:
            entry = source.entry(name)
            if name in raw.names and raw.entry(name) == entry:
                continue
            if entry.shape and entry.shape[0] * 64 > 1 << 16:  # of a scale that stands for many rows
                continue
            dense = source.read(name)
            assert (dense.dtype, tuple(dense.shape)) == (torch.bfloat16, entry.shape)
            assert ops.linear(dense.flatten(0, -2)[:1], dense.flatten(0, -2)).numel() >= 0
