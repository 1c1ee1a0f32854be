"""The cell of a quantisation error: how much of nf4's or int8's error LoftQ and QPiSSA remove from some weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bench.compare.weights import language_model
from bench.experiments.encoder import load_model, minilm
from bench.experiments.experiment import Cell, Options, Result
from bench.experiments.numbers import rounded
from pissa import ops

METHODS: dict[str, dict[str, Any]] = {
    "LoftQ, T = 1": {"quantise_first": True},
    "QPiSSA, T = 1": {},
    "LoftQ, T = 5": {"quantise_first": True, "quant_iters": 5},
    "QPiSSA, T = 5": {"quant_iters": 5},
}
"""What `ops.split` is told. Plain quantisation is QLoRA's."""
PARTS = {
    "minilm": ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
    "smollm2": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
"""The linear layers of a block, as the ends of their names tell them; the longest end that fits counts."""


def power_law(size: int, exponent: float) -> Tensor:
    """[size, size] with random singular vectors and the singular values i^-exponent, computed in float64."""
    generator = torch.Generator().manual_seed(0)
    normal = (torch.randn(size, size, generator=generator, dtype=torch.float64) for _ in range(2))
    u, v = (torch.linalg.qr(matrix).Q for matrix in normal)
    return ((u * torch.arange(1, size + 1, dtype=torch.float64) ** -exponent) @ v.mT).float()


MADE: dict[str, Callable[[int], Tensor]] = {
    "gaussian": lambda size: torch.randn(size, size, generator=torch.Generator().manual_seed(0)),
    "power law 0.45": lambda size: power_law(size, 0.45),
    "power law 1": lambda size: power_law(size, 1.0),
}
"""Square matrices by their side; the singular values of power laws are i^-p."""


@dataclass(frozen=True)
class QuantErrorCell(Cell):
    """Nuclear norms of W - Q - B A for the first, a middle and the last layer of one kind, or for one made matrix."""

    kind: ClassVar[str] = "quant_error"
    source: str
    """Of PARTS or MADE."""
    part: str
    """Of the source's PARTS; "" of a made one."""
    format: str
    r: int

    def prepare(self, options: Options) -> None:
        weights(self.source, options)

    def run(self, options: Options) -> Result:
        chosen = weights(self.source, options)[self.part]
        norms: dict[str, list[float | None]] = {"plain": [], **{name: [] for name in METHODS}}
        for weight in chosen:
            plain = ops.dequantize(ops.quantize(weight, self.format))
            norms["plain"].append(_nuclear(plain.sub_(weight)))
            for name, how in METHODS.items():
                norms[name].append(_nuclear(_approximation(weight, self.r, self.format, how).sub_(weight)))
        return {"nuclear_norms": norms, "shape": list(chosen[0].shape)}


def removed(result: Result, method: str) -> float:
    """The share of plain quantisation's nuclear norm that the method removes (arXiv 2404.02948, eq. 6 to 8), the mean
    over the layers."""
    norms = result["nuclear_norms"]
    shares = [1 - norm / plain for norm, plain in zip(norms[method], norms["plain"], strict=True)]
    return float(sum(shares) / len(shares))


@cache
def weights(source: str, options: Options) -> dict[str, list[Tensor]]:
    """The weights [out, in] of a source by part."""
    if source in MADE:
        return {"": [MADE[source](64 if options.quick else 512)]}
    model = (
        load_model(minilm(), 0, options.quick)
        if source == "minilm"
        else language_model(options.quick, torch.bfloat16).requires_grad_(False)
    )
    found: dict[str, list[Tensor]] = {part: [] for part in PARTS[source]}
    for name, module in model.named_modules():
        ends = [part for part in found if name.endswith(f".{part}")]
        if isinstance(module, nn.Linear) and ends:
            found[max(ends, key=len)].append(module.weight.detach())
    return {part: [each[0], each[len(each) // 2], each[-1]] for part, each in found.items()}


def _approximation(weight: Tensor, r: int, format: str, how: dict[str, Any]) -> Tensor:
    """Q + B A, float32."""
    a, b, residual, *_ = ops.split(weight, r, form=format, **how)
    assert isinstance(residual, ops.QuantizedWeight)
    return ops.dequantize(residual).addmm_(b, a)


def _nuclear(error: Tensor) -> float | None:
    """The sum of the singular values: of the square roots of the eigenvalues of the Gram matrix in float64, which are
    accurate to about 1e-8 of the largest. torch.linalg.svdvals takes six times as long for 1024 x 2816."""
    wide = (error if error.shape[0] <= error.shape[1] else error.mT).double()
    eigenvalues: Tensor = torch.linalg.eigvalsh(wide @ wide.mT)
    return rounded(float(eigenvalues.flip(0).clamp(min=0).sqrt().sum()))
