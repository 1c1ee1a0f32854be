"""Conversion holds one layer at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pissa
from live_bytes import LiveBytes
from lora_files import NAMES

OUT, IN, RANK = 96, 160, 8
TARGET = 8 * RANK * (OUT + IN)
"""The factors of one layer in float64."""


def save_lora(folder: Path, layers: int, **fields: object) -> Path:
    """A plain LoRA of so many equal layers, and biases beside them."""
    generator = torch.Generator().manual_seed(layers)
    tensors = {}
    for index in range(layers):
        place = f"base_model.model.layers.{index}"
        tensors[f"{place}.lora_A.weight"] = torch.randn(RANK, IN, generator=generator)
        tensors[f"{place}.lora_B.weight"] = torch.randn(OUT, RANK, generator=generator)
        tensors[f"{place}.bias"] = torch.randn(OUT, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / NAMES[1])
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["layers"], "bias": "lora_only"}
    (folder / NAMES[0]).write_text(json.dumps(config | fields))
    return folder


@pytest.mark.parametrize("layout", ["rank", "initial"])
def test_memory_does_not_grow_with_the_number_of_layers(layout: str, tmp_path: Path) -> None:
    peaks = []
    for layers in (3, 24):
        source = save_lora(tmp_path / str(layers) / "adapter", layers)
        options: dict[str, object] = {"rank": 3} if layout == "rank" else {}
        if layout == "initial":
            options = {"initial": save_lora(tmp_path / str(layers) / "initial", layers)}
        with LiveBytes() as memory:
            pissa.convert(source, tmp_path / str(layers) / "lora", **options)
        peaks.append(memory.peak)
    assert peaks[0] == peaks[1]
    # Factors, their QR and singular value decompositions, what is kept and what is left out, and eight random inputs;
    # factors with a start have twice the rank.
    assert peaks[1] <= (24 if layout == "initial" else 12) * TARGET
