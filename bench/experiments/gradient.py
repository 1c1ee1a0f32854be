"""The cell of a first gradient: the gradient of A and B before any training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import DataCollatorWithPadding

import pissa
from bench.experiments.encoder import BATCH, load, load_model
from bench.experiments.experiment import Cell, Options, Result
from bench.experiments.methods import METHODS, Method, Setting
from bench.experiments.numbers import rounded
from pissa import PissaConfig
from pissa.layers.layer import PissaLayer

TASK, R = "films", 16
SKETCH = 256
"""Numbers that stand for a gradient: the cosine of two of them is that of the gradients, ± 1/√256."""


def _other_sketch(model: nn.Module, setting: Setting) -> nn.Module:
    config = PissaConfig(
        r=setting.r, seed=setting.seed, target_modules=setting.target_modules, task_type=setting.task_type
    )
    return pissa.wrap(model, config)


STARTS: dict[str, Method] = {name: METHODS[name] for name in ("lora", "gaussian", "pissa", "unit")}
STARTS["pissa_sketch"] = Method("PiSSA, the SVD's sketch drawn by the seed", _other_sketch)


@dataclass(frozen=True)
class GradientCell(Cell):
    """The gradient on one batch of films, the same for all seeds, as is the head: the seed draws the start alone.

    Factors that the sign or the order of singular vectors changes give the same function: two starts are compared by
    the first step of gradient descent on W, dB A + B dA, as well as by the gradients of A and of B.
    """

    kind: ClassVar[str] = "gradient"
    method: str
    """Of STARTS."""
    seed: int

    def prepare(self, options: Options) -> None:
        load(TASK, options)

    def run(self, options: Options) -> Result:
        data = load(TASK, options)
        model = load_model(data.folder, 0, options.quick).eval()  # without dropout
        model = STARTS[self.method].wrap(model, Setting(R, self.seed, 1, "SEQ_CLS")).eval()
        batch = DataCollatorWithPadding(data.tokenizer)(data.train[:BATCH])
        model(**batch).loss.backward()
        layers = list(_layers(model))
        found = {
            "a": [layer.gradient_a for layer in layers],
            "b": [layer.gradient_b for layer in layers],
            "step": [layer.b @ layer.gradient_a + layer.gradient_b @ layer.a for layer in layers],
        }
        return {
            "norms": {name: rounded(_norm(tensors)) for name, tensors in found.items()},
            "sketches": {name: sketch(tensors) for name, tensors in found.items()},
            "layers": len(layers),
        }


def cosine(one: Result, other: Result, of: str) -> float | None:
    """The cosine of two results' gradients, "a", "b" or "step", from their sketches. None if one of them is zero."""
    first, second = (torch.tensor(result["sketches"][of], dtype=torch.float64) for result in (one, other))
    if not first.any() or not second.any():
        return None
    return float(torch.cosine_similarity(first, second, dim=0))


class _Layer(NamedTuple):
    """The factors of a layer, and the loss's gradients with respect to them."""

    a: Tensor
    b: Tensor
    gradient_a: Tensor
    gradient_b: Tensor


def _layers(model: nn.Module) -> Iterator[_Layer]:
    """The layers. PEFT's parameters are the factors, and ours are the differences from them."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            a, b = (factor["default"].weight for factor in (layer.lora_A, layer.lora_B))
            assert a.grad is not None
            assert b.grad is not None
            if isinstance(layer, PissaLayer):
                start = layer.start_of("default")
                yield _Layer(start.a0 + a.detach(), start.b0 + b.detach(), a.grad, b.grad)
            else:
                yield _Layer(a.detach(), b.detach(), a.grad, b.grad)


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


def sketch(tensors: Iterable[Tensor]) -> list[float | None]:
    """All elements with random signs, summed in SKETCH random groups (Charikar, Chen and Farach-Colton, 2002): the same
    signs and groups for tensors of the same shapes."""
    generator = torch.Generator().manual_seed(0)
    sums = torch.zeros(SKETCH, dtype=torch.float64)
    for tensor in tensors:
        values = tensor.flatten().double()
        groups = torch.randint(SKETCH, values.shape, generator=generator)
        signs = torch.randint(2, values.shape, generator=generator) * 2 - 1
        sums.index_add_(0, groups, values * signs)
    return [rounded(value) for value in sums.tolist()]
