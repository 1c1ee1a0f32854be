"""Measures the rate of the kernels alone: SVD and residual of weights of one shape that are in memory.

    python -m bench.checkpoints.kernels --shape 7b

For each shape of a layer some weights are timed. The time is multiplied by the number of such weights in the model.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from statistics import median

import torch

from bench.checkpoints.generate import DTYPES, SHAPES, base_weight, tensor_shapes
from bench.checkpoints.timed import note
from pissa import ops

AT_ONCE = 1 << 25
"""Elements of the weights that are split together, or one weight."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoints.kernels", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--quant-iters", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    from transformers import LlamaConfig

    sizes = tensor_shapes(LlamaConfig(**SHAPES[options.shape]))
    layers = Counter(shape for name, shape in sizes.items() if name.endswith("_proj.weight"))
    seconds = {}
    for shape, count in layers.items():
        many = min(count, max(1, AT_ONCE // math.prod(shape)))
        weights = [base_weight(*shape, DTYPES[options.dtype], seed) for seed in range(many)]
        times = []
        for _ in range(options.repeats):
            begun = time.perf_counter()
            ops.split_many(
                weights,
                [options.rank] * many,
                [1.0] * many,
                form=options.format,
                quant_iters=options.quant_iters,
            )
            times.append((time.perf_counter() - begun) / many)
        base_weight.cache_clear()
        seconds["x".join(map(str, shape))] = {"count": count, "each": median(times)}
    total = sum(one["count"] * one["each"] for one in seconds.values())
    elements = sum(math.prod(shape) * count for shape, count in layers.items())
    nbytes = elements * DTYPES[options.dtype].itemsize
    note(
        weights=seconds,
        total=total,
        elements=elements,
        gb_per_second=nbytes / total / 1e9,
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main()
