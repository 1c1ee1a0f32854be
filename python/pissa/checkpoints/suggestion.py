"""The ranks to give the layers of a model for a budget of parameters, beside one rank for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pissa.checkpoints.budget import Candidate, allocate, as_pattern
from pissa.checkpoints.layer_report import LayerReport, by_kind
from pissa.checkpoints.quant_errors import PLAIN


@dataclass(frozen=True)
class Suggestion:
    """Ranks for a budget of parameters, beside one rank for all layers."""

    budget: int
    ranks: dict[str, int]
    parameters: int
    lost: float
    """The share of the energy that the ranks leave, each kind's weighted by its error if something is quantised."""
    largest: int
    """The largest rank that was looked at. A layer that has it might want more."""
    uniform: int
    """The largest rank, a multiple of 8 if it can be, that the budget allows in all layers."""
    uniform_parameters: int
    uniform_lost: float

    def pattern(self) -> tuple[int, dict[str, int]]:
        """`r` and `rank_pattern` of a PissaConfig."""
        return as_pattern(self.ranks)


def suggest(
    layers: Sequence[LayerReport], budget: int, step: int = 8, together: Sequence[Sequence[str]] | None = None
) -> Suggestion:
    """Ranks, multiples of `step`, at which as little as possible of the layers' energy is lost; see `allocate`.

    What a quantised residual loses is near its own energy times what the format loses of each unit, which differs from
    kind to kind: the energies are weighted by that, if errors are known.

    Args:
        together: the names of the layers, those together that need one rank: the experts of a module. By default each
            is alone.

    Raises:
        ValueError: the budget is less than a step for each layer.
    """
    weights = {
        layer.name: summary.error((PLAIN, 0)) ** 2 if summary.quantised else 1.0
        for summary in by_kind(layers).values()
        for layer in summary.layers
    }
    by_name = {layer.name: layer for layer in layers}
    groups = together or [[name] for name in by_name]
    candidates = []
    for names in groups:
        gains = [weights[name] * by_name[name].spectrum.values.square() for name in names]
        candidates.append(
            Candidate(torch.stack(gains).sum(0).tolist(), sum(sum(by_name[name].shape) for name in names))
        )
    allocated = allocate(candidates, budget, step)
    of_name = {name: rank for names, rank in zip(groups, allocated, strict=True) for name in names}
    ranks = [of_name[layer.name] for layer in layers]
    known = max(len(layer.spectrum.values) for layer in layers)
    uniform = max(
        rank
        for rank in range(step, max(known, step) + 1, step)
        if sum(layer.parameters(rank) for layer in layers) <= budget
    )

    def lost(chosen: Sequence[int]) -> float:
        rest = [weights[layer.name] * layer.spectrum.lost(rank) for layer, rank in zip(layers, chosen, strict=True)]
        whole = sum(weights[layer.name] * layer.spectrum.total for layer in layers)
        return sum(rest) / whole if whole else 0.0

    even = [layer.rank(uniform) for layer in layers]
    if lost(even) < lost(ranks):  # what `allocate` may lack of the best, if experts make steps large
        ranks = even
    return Suggestion(
        budget,
        {layer.name: rank for layer, rank in zip(layers, ranks, strict=True)},
        sum(layer.parameters(rank) for layer, rank in zip(layers, ranks, strict=True)),
        lost(ranks),
        known,
        uniform,
        sum(layer.parameters(uniform) for layer in layers),
        lost(even),
    )
