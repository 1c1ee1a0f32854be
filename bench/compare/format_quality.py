"""Compares the quantised formats: the error that they cause in real weights, and the memory that they take.

    python -m bench.compare.format_quality --model DIR    # the linear layers of a model: a minute on one core
    python -m bench.compare.format_quality                # a random weight whose singular values are like a model's

Errors are ‖W - W'‖ / ‖W‖ over all layers together, in float64. W' is the quantised weight. For QPiSSA it is Q + B0 A0,
where Q is the quantised residual and B0 A0 the principal part of that rank. Memory is that of codes and scales.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.compare.weights import bfloat16_weight
from pissa import ops
from pissa.ops.formats import FORMATS

RANKS = (16, 64, 128)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare.format_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="folder of a language model of transformers")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, metavar="R", help="of the principal part")
    return parser.parse_args()


def linear_weights(folder: Path) -> list[Tensor]:
    """The weights of all linear layers but the output layer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    head = model.get_output_embeddings()
    return [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear) and m is not head]


def squared(tensors: Iterable[Tensor]) -> float:
    return sum(tensor.double().square().sum().item() for tensor in tensors)


def bits(weight: ops.QuantizedWeight) -> int:
    return sum(8 * part.numel() * part.element_size() for part in weight.tensors().values())


def main() -> None:
    options = arguments()
    weights = linear_weights(options.model) if options.model else [bfloat16_weight(2048)]
    size, elements = squared(weights), sum(weight.numel() for weight in weights)
    print(f"{len(weights)} weights, {elements:,} elements\n")
    header = ("format", "bits a weight", "quantised", *(f"QPiSSA, r = {r}" for r in options.ranks))
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    factors = {
        r: [ops.split(weight, min(r, *weight.shape), form="implicit")[:2] for weight in weights] for r in options.ranks
    }
    for format in FORMATS:
        stored = [ops.quantize(weight, format) for weight in weights]
        cells = [sum(map(bits, stored)) / elements]
        errors = [squared(w.double() - ops.dequantize(q) for w, q in zip(weights, stored, strict=True))]
        for r in options.ranks:
            error = 0.0
            for weight, (a0, b0) in zip(weights, factors[r], strict=True):
                [residual] = ops.residual_many([weight], [a0], [b0], [1.0], form=format)
                error += squared([weight.double() - ops.dequantize(residual) - b0.double() @ a0.double()])
            errors.append(error)
        relative = (f"{math.sqrt(error / size):.3%}" for error in errors)
        print(f"| {format} | {cells[0]:.2f} | {' | '.join(relative)} |", flush=True)


if __name__ == "__main__":
    main()
