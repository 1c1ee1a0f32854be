"""The cell of an output error: how much of nf4's error in a layer's outputs each repair removes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bench.compare.weights import hard_spectrum
from bench.experiments.experiment import Cell, Options, Result
from bench.experiments.language import calibration_of, load_model, task_of
from bench.experiments.methods import METHODS as TRAINED
from bench.experiments.methods import Reading
from bench.experiments.numbers import rounded
from pissa import ops

ACTIVATIONS: dict[str, Any] = {"quantise_first": True}
METHODS: dict[str, dict[str, Any]] = {
    "QPiSSA, T = 1": {},
    "LoftQ, T = 5": {"quantise_first": True, "quant_iters": 5},
    "diagonal repair": ACTIVATIONS,
    "repair, T = 1": ACTIVATIONS,
    "repair, T = 5": ACTIVATIONS | {"quant_iters": 5},
    "error feedback and repair": ACTIVATIONS | {"error_feedback": True},
}
"""What `ops.split` is told beside the second moment. Those of weights alone have none."""
FEEDBACK = "error feedback"
"""No low-rank part at all."""
PARTS = ("q_proj", "o_proj", "gate_proj", "down_proj")
MADE = "made"


@dataclass(frozen=True)
class OutputErrorCell(Cell):
    """√tr(D R Dᵀ) of D = W - Q - B A: in the middle block of SmolLM2, with R of 64 training problems; or made, square:
    noise with power-law spikes as W, and R with eigenvalues 1 / i, as SmolLM2's have between the 4th and the 256th
    (i^-0.9 to i^-1.4)."""

    kind: ClassVar[str] = "output_error"
    source: str
    """One of PARTS, or MADE."""
    side: int
    """In-features."""
    r: int

    def prepare(self, options: Options) -> None:
        operands(self.source, self.side, options)

    def run(self, options: Options) -> Result:
        weight, moment = operands(self.source, self.side, options)
        diagonal = moment.diagonal().diag().contiguous()
        found = {"plain": _error(weight, ops.quantize(weight), None, moment)}
        found[FEEDBACK] = _error(weight, ops.quantize(weight, second_moment=moment), None, moment)
        for name, how in METHODS.items():
            known = None if name in ("QPiSSA, T = 1", "LoftQ, T = 5") else moment
            known = diagonal if name == "diagonal repair" else known
            a, b, residual, *_ = ops.split(weight, self.r, form="nf4", second_moment=known, **how)
            found[name] = _error(weight, residual, (a, b), moment)
        return {"errors": found, "shape": list(weight.shape)}


def removed(result: Result, method: str) -> float:
    """The share of plain nf4's squared error of the outputs that was removed."""
    errors = result["errors"]
    return 1 - (float(errors[method]) / float(errors["plain"])) ** 2


@cache
def operands(source: str, side: int, options: Options) -> tuple[Tensor, Tensor]:
    """The weight, float32, and the second moment of its inputs."""
    if source != MADE:
        task = task_of("gsm8k", options)
        calibration = calibration_of("gsm8k", Reading(), options)
        model = load_model(task.folder, TRAINED["lora"], options.quick)
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and source in name]
        name = names[len(names) // 2]
        return model.get_submodule(name).weight.detach().float(), calibration.moments[name]
    side = 64 if options.quick else side
    basis = torch.linalg.qr(torch.randn(side, side, generator=torch.Generator().manual_seed(1))).Q
    return hard_spectrum(side), (basis / torch.arange(1, side + 1)) @ basis.mT


def _error(
    weight: Tensor, residual: Tensor | ops.QuantizedWeight | None, factors: tuple[Tensor, Tensor] | None, moment: Tensor
) -> float | None:
    assert isinstance(residual, ops.QuantizedWeight)
    lost = ops.dequantize(residual).sub_(weight)
    if factors is not None:
        lost = lost.addmm_(factors[1], factors[0])
    square = torch.einsum("oi,ij,oj->", lost.double(), moment.double(), lost.double())
    return rounded(float(square.sqrt()))
