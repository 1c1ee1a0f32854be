"""Measures a training step over a mapped checkpoint, and the products of that step at torch's dense rate.

    python -m bench.checkpoints.step OUT --steps 2            # memory and time of the step alone
    python -m bench.checkpoints.step OUT --steps 3 --dense    # in turns with the products

A step is forward and backward of 1 x 512 tokens with gradient checkpointing, and AdamW. Its products with the weights
of a layer are y = x Wᵀ, computed twice because the backward pass repeats it, and dx = dy W. The output layer has one
of each.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.checkpoints.timed import note

TOKENS = 512

_MALLOC_LIMITS = {-3: 8 << 20, -1: 64 << 20}  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD: freed blocks go back


class DenseProducts:
    """The products of a step, in bf16, by torch: those of one layer of the model, and those of the output layer."""

    def __init__(self, block: Counter[tuple[int, int]], blocks: int, head: tuple[int, int], tokens: int) -> None:
        self._blocks, self._head, self._tokens = blocks, head, tokens
        self._block = block
        self._weights: dict[tuple[int, int], Tensor] = {
            shape: torch.randn(shape, dtype=torch.bfloat16) for shape in (*block, head)
        }

    def flops(self) -> int:
        """The floating-point operations of all products of a step."""
        inside = sum(rows * cols * count for (rows, cols), count in self._block.items())
        return 2 * self._tokens * (3 * self._blocks * inside + 2 * self._head[0] * self._head[1])

    def seconds(self, samples: int) -> float:
        """The seconds of a step, from the mean over that many layers and one output layer."""
        block = [shape for shape, count in self._block.items() for _ in range(count)]
        layers = sum(self._products(block, 2) for _ in range(samples)) / samples
        return self._blocks * layers + self._products([self._head], 1)

    def _products(self, shapes: list[tuple[int, int]], forwards: int) -> float:
        taken = 0.0
        for rows, cols in shapes:
            weight = self._weights[rows, cols]
            x, dy = (torch.ones(self._tokens, size, dtype=torch.bfloat16) for size in (cols, rows))
            begun = time.perf_counter()
            for _ in range(forwards):
                x @ weight.mT
            dy @ weight
            taken += time.perf_counter() - begun
        return taken


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoints.step", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--init", help="of an adapter of rank 16 on a folder that pissa init has not split")
    parser.add_argument("--dense", action="store_true", help="time the dense products too, before and after each step")
    parser.add_argument("--samples", type=int, default=4, help="layers whose dense products are timed")
    options = parser.parse_args()
    import pissa
    from pissa.layers.layer import pissa_layers

    for limit, size in _MALLOC_LIMITS.items():
        ctypes.CDLL(None).mallopt(limit, size)
    begun = time.perf_counter()
    fields = {"r": 16, "init": options.init, "target_modules": "all-linear"} if options.init else {}
    model = pissa.load(options.folder, is_trainable=True, **fields)
    loaded = time.perf_counter() - begun
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    base = model.get_base_model()
    shapes = Counter(layer.matrix_shape for layer in pissa_layers(base).values())
    blocks = base.config.num_hidden_layers
    head = (base.config.vocab_size, base.config.hidden_size)
    per_block = Counter({shape: count // blocks for shape, count in shapes.items()})
    dense = DenseProducts(per_block, blocks, head, options.tokens) if options.dense else None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)  # as transformers' Trainer
    generator = torch.Generator().manual_seed(0)
    steps, products, losses = [], [], []
    if dense:
        products.append(dense.seconds(options.samples))
    for _ in range(options.steps):
        tokens = torch.randint(base.config.vocab_size, (1, options.tokens), generator=generator)
        begun = time.perf_counter()
        losses.append(_step(model, optimizer, tokens))
        steps.append(time.perf_counter() - begun)
        if dense:
            products.append(dense.seconds(options.samples))
    note(
        load=loaded,
        steps=steps,
        losses=losses,
        trained=sum(p.numel() for p in trained),
        threads=torch.get_num_threads(),
    )
    if dense:
        note(products=products, flops=dense.flops())


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> float:
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


if __name__ == "__main__":
    main()
