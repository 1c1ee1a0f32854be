"""Weights in codes in a checkpoint's file: which tensors make one, and whether they fit each other."""

from __future__ import annotations

from pathlib import Path

import torch

from pissa import ops
from pissa.containers.coded_weights import coded_weights
from pissa.containers.tensor_file import Source

FILE, HEADER = "model.safetensors", 8


def parse(folder: Path) -> None:
    source = Source(folder)
    for weight in coded_weights(source, torch.bfloat16).values():
        shape = weight.shape
        if shape and shape[0] * 64 > 1 << 16:  # of a scale that stands for many rows
            continue
        dense = weight.decode()
        assert (dense.dtype, tuple(dense.shape)) == (torch.bfloat16, shape)
        assert ops.linear(dense.flatten(0, -2)[:1], dense.flatten(0, -2)).numel() >= 0
