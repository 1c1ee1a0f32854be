"""A task of bench/training that takes milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def tiny_task() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from bench.training.tasks import Task

    class Tiny(Task):
        name, steps, batch = "tiny", 2, 2
        rates = (1e-3, 2e-3, 4e-3)
        dtype, task_type = torch.float32, "CAUSAL_LM"

        def __init__(self) -> None:
            self.facts = {"train": 100}
            sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
            self._config = LlamaConfig(**sizes, vocab_size=64)
            self.started = 0

        def model(self) -> nn.Module:
            self.started += 1
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return LlamaForCausalLM(self._config)

        def training_batches(self, seed: int) -> Iterator[dict[str, torch.Tensor]]:
            generator = torch.Generator().manual_seed(seed)
            while True:
                tokens = torch.randint(64, (self.batch, 8), generator=generator)
                yield {"input_ids": tokens, "labels": tokens}

        def held_out(self) -> list[dict[str, torch.Tensor]]:
            batches = self.training_batches(99)
            return [next(batches) for _ in range(2)]

        def measures(self, outputs: Any, batch: dict[str, torch.Tensor]) -> dict[str, tuple[float, int]]:
            return {"loss": (2 * outputs.loss.item(), 2)}

    return Tiny()
