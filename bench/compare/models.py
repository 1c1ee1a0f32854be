"""The models that docs/what-fits.md names: their shapes, and what training them on 500 examples takes.

Minutes are computed by the committed rates (tokens a second times parameters), memory by `training_memory`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from pissa.checkpoints.training_memory import training_memory
from pissa.config import Form
from pissa.ops.formats import FORMATS

EXAMPLES, TOKENS, BATCH, RANK = 500, 200, 8, 16
PROCESS = 550e6
"""Bytes of `pissa finetune` once torch, transformers and TRL are imported, before it opens a model."""


def quantised_bytes(shape: tuple[int, int], form: Form) -> int:
    """The bytes of a weight in codes."""
    format = FORMATS[form.name]
    tensors = format.tensors(shape, *format.options(None, form.double_quant, shape[1]))
    return sum(math.prod(size) * kept.itemsize for size, kept in tensors.values())


class Model(NamedTuple):
    """A model of the Hub, by its config.json. Embeddings and output layer are one tensor in all of these."""

    name: str
    licence: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes [out, in] of the layers to adapt, by name."""
        hidden, wide, narrow = self.hidden, self.heads * self.head, self.kv_heads * self.head
        block = {"q": (wide, hidden), "k": (narrow, hidden), "v": (narrow, hidden), "o": (hidden, wide)}
        block |= {"gate": (self.intermediate, hidden), "up": (self.intermediate, hidden)}
        block |= {"down": (hidden, self.intermediate)}
        return {f"layers.{i}.{name}": shape for i in range(self.layers) for name, shape in block.items()}

    @property
    def parameters(self) -> int:
        return self.vocabulary * self.hidden + sum(out * columns for out, columns in self.shapes.values())

    def memory(self, quant: str | None) -> float:
        """Bytes of the process: in bfloat16 as `pissa finetune` trains by default; or with --quant and gradient
        checkpointing."""
        weights = 2 * self.vocabulary * self.hidden
        for out, columns in self.shapes.values():
            weights += quantised_bytes((out, columns), Form.quantised(quant, True)) if quant else 2 * out * columns
        parts = training_memory(
            self.shapes, RANK, weights=weights, dtype=torch.bfloat16, hidden=self.hidden, tokens=BATCH * TOKENS
        )
        return PROCESS + parts["checkpointing" if quant else "plain"]["total"]


MODELS = (
    Model("HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0", 576, 1536, 30, 9, 3, 64, 49_152),
    Model("HuggingFaceTB/SmolLM2-360M-Instruct", "Apache-2.0", 960, 2560, 32, 15, 5, 64, 49_152),
    Model("Qwen/Qwen3-0.6B", "Apache-2.0", 1024, 3072, 28, 16, 8, 128, 151_936),
    Model("google/gemma-3-1b-it", "Gemma", 1152, 6912, 26, 4, 1, 256, 262_144),
    Model("meta-llama/Llama-3.2-1B-Instruct", "Llama 3.2", 2048, 8192, 16, 32, 8, 64, 128_256),
    Model("Qwen/Qwen3-1.7B", "Apache-2.0", 2048, 6144, 28, 16, 8, 128, 151_936),
    Model("meta-llama/Llama-3.2-3B-Instruct", "Llama 3.2", 3072, 8192, 28, 24, 8, 128, 128_256),
    Model("Qwen/Qwen3-4B", "Apache-2.0", 2560, 9728, 36, 32, 8, 128, 151_936),
)
