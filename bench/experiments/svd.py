"""The cell of a truncated SVD: its seconds, and how far its result is from the exact one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench.compare.weights import energy, hard_spectrum
from bench.experiments.encoder import load_model, minilm
from bench.experiments.experiment import Cell, Options, Result
from bench.experiments.numbers import rounded
from pissa import ops

LARGEST = 64
"""The largest rank."""
REPETITIONS = 5

Triplets = tuple[Tensor, Tensor, Tensor]
"""U [out, r], S [r], V [in, r]."""


@dataclass(frozen=True)
class SvdCell(Cell):
    """The decompositions of all linear weights of MiniLM's blocks, or of one large matrix, by one algorithm."""

    kind: ClassVar[str] = "svd"
    weights: str
    """"minilm", or "spikes": `bench.compare.weights.hard_spectrum` of 2048²."""
    code: str
    """"pissa", or "torch"."""
    passes: int | str
    """Over each weight, an even number; "auto" of pissa's, "exact" of torch's: `torch.linalg.svd`."""
    r: int

    def prepare(self, options: Options) -> None:
        exact(self.weights, options)

    def run(self, options: Options) -> Result:
        weights = weights_of(self.weights, options)
        decompose = self._decompose()
        times = []
        for _ in range(1 if self.passes == "exact" else REPETITIONS):
            begun = time.process_time()
            found = [decompose(weight) for weight in weights]
            times.append(time.process_time() - begun)
        difference = size = held = possible = 0.0
        for weight, (u, s, v), (best_u, best_s, best_v) in zip(
            weights, found, exact(self.weights, options), strict=True
        ):
            best_s = best_s[: self.r]
            best = (best_u[:, : self.r] * best_s) @ best_v[:, : self.r].mT
            difference += ((u.double() * s.double()) @ v.double().mT - best).abs().sum().item()
            size += best.abs().sum().item()
            held += energy(weight, v)
            possible += best_s.square().sum().item()
        return {
            "seconds": {"decomposition": rounded(median(times))},
            "difference": rounded(difference / size),
            "energy_lost": rounded(1 - held / possible),
            "matrices": len(weights),
        }

    def _decompose(self) -> Callable[[Tensor], Triplets]:
        passes, r = self.passes, self.r
        if passes == "exact":
            return lambda weight: _leading(*torch.linalg.svd(weight, full_matrices=False), r)
        if self.code == "torch":
            assert isinstance(passes, int)
            return lambda weight: torch.svd_lowrank(
                weight, r, niter=passes // 2 - 1
            )  # reads the weight 2 + 2 niter times
        return lambda weight: ops.svd_lowrank(weight, r, passes=passes)  # type: ignore[arg-type]


@cache
def weights_of(name: str, options: Options) -> list[Tensor]:
    """float32 matrices [out, in]."""
    if name == "spikes":
        return [hard_spectrum(128 if options.quick else 2048)]
    model = load_model(minilm(), 0, options.quick)
    return [
        module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layer." in name
    ]


@cache
def exact(name: str, options: Options) -> list[Triplets]:
    """The leading triplets in float64, LARGEST of them."""
    weights = weights_of(name, options)
    return [_leading(*torch.linalg.svd(weight.double(), full_matrices=False), LARGEST) for weight in weights]


def _leading(u: Tensor, s: Tensor, vh: Tensor, r: int) -> Triplets:
    return u[:, :r].contiguous(), s[:r].contiguous(), vh[:r].mT.contiguous()
