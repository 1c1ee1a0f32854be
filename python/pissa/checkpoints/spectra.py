"""Reports what a checkpoint offers PiSSA, read matrix by matrix: spectra, ranks for a budget of parameters, and the
memory of training."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pissa import ops
from pissa.checkpoints.budget import Candidate, allocate, as_pattern, check_budget, kinds_of
from pissa.checkpoints.init import SplitPlan
from pissa.checkpoints.load import of_layer
from pissa.checkpoints.training_memory import quantised_bytes, training_memory
from pissa.config import PissaConfig
from pissa.containers.checkpoint import Checkpoint
from pissa.containers.model_folder import model_config

# Rows of a weight that are copied to float64 at once.
_ROWS = 256


# ---- One layer -------------------------------------------------------------------------------------------------------


class LayerReport(NamedTuple):
    """The results for the weight [out, in] of one layer."""

    name: str
    shape: tuple[int, int]
    values: Tensor
    """The leading singular values, float64 [k], descending."""
    total: float
    """The squared Frobenius norm, which is the sum of the squares of all singular values."""

    def lost(self, rank: int) -> float:
        """The part of `total` that the first `rank` singular values do not hold."""
        return max(self.total - float(self.values[:rank].square().sum()), 0.0)

    @property
    def stable_rank(self) -> float:
        """`total` divided by the square of the largest singular value. It is small if few directions dominate."""
        largest = float(self.values[0]) ** 2
        return self.total / largest if largest else 0.0


def layer_report(name: str, weight: Tensor, known: int) -> LayerReport:
    """Examines the weight [out, in] of a layer, float32, bfloat16 or float16. The `known` leading values are those of
    `ops.svd_lowrank`: never above the true ones, and what PiSSA's factors really hold.

    Raises:
        ValueError: the weight contains NaN or Inf. The message names the layer.
    """
    with of_layer(name):
        _, values, _ = ops.svd_lowrank(weight, min(known, *weight.shape))
    total = float(sum(rows.double().square_().sum() for rows in torch.split(weight, _ROWS)))
    return LayerReport(name, (weight.shape[0], weight.shape[1]), values.double().cpu(), total)


# ---- Several layers --------------------------------------------------------------------------------------------------


class Summary(NamedTuple):
    """One layer, or several layers together."""

    layers: Sequence[LayerReport]

    def energy(self, rank: int) -> float:
        """The share of the squared norm that `rank` directions in each layer hold; 1 for weights of zeros."""
        total = sum(layer.total for layer in self.layers)
        return 1 - sum(layer.lost(rank) for layer in self.layers) / total if total else 1.0

    def energies(self, ranks: Iterable[int]) -> dict[str, float]:
        """The same at these ranks, as stored in JSON."""
        return {str(rank): self.energy(rank) for rank in ranks}


def by_kind(layers: Iterable[LayerReport]) -> dict[str, Summary]:
    """The layers of each kind together."""
    by_name = {layer.name: layer for layer in layers}
    return {kind: Summary([by_name[name] for name in names]) for kind, names in kinds_of(by_name).items()}


# ---- Ranks for a budget ----------------------------------------------------------------------------------------------


class SuggestedRanks(NamedTuple):
    """Ranks for a budget of parameters, compared with one rank for all layers."""

    ranks: dict[str, int]
    """The rank of each layer."""
    budget: int
    r: int
    rank_pattern: dict[str, int]
    """Together with `r`, the fields of a PissaConfig that gives the layers these ranks."""
    parameters: int
    lost: float
    """The share of the energy that the ranks do not hold."""
    largest_rank: int
    """The largest rank that was examined. A layer with this rank might benefit from more."""
    uniform: dict[str, Any]
    """The same for the largest rank (a multiple of 8 if possible) that the budget allows in all layers: "r",
    "parameters", "lost"."""


def suggest(
    layers: Sequence[LayerReport], budget: int, step: int = 8, together: Sequence[Sequence[str]] | None = None
) -> SuggestedRanks:
    """Computes ranks, multiples of `step`, that lose as little as possible of the layers' energy; see `allocate`.

    Args:
        together: the layers' names, in groups that need one rank: the experts of a module. By default each layer is its
            own group.
    """
    by_name = {layer.name: layer for layer in layers}
    total = sum(layer.total for layer in layers)

    def even(rank: int) -> dict[str, int]:
        return {layer.name: min(rank, *layer.shape) for layer in layers}

    def parameters(ranks: Mapping[str, int]) -> int:
        return sum(ranks[layer.name] * sum(layer.shape) for layer in layers)

    def lost(ranks: Mapping[str, int]) -> float:
        return sum(layer.lost(ranks[name]) for name, layer in by_name.items()) / total if total else 0.0

    groups = together or [[name] for name in even(1)]
    candidates = []
    for names in groups:
        gains = torch.stack([by_name[name].values.square() for name in names]).sum(0)
        candidates.append(Candidate(gains.tolist(), sum(sum(by_name[name].shape) for name in names)))
    allocated = allocate(candidates, budget, step)
    ranks = {name: rank for names, rank in zip(groups, allocated, strict=True) for name in names}

    largest = max(len(layer.values) for layer in layers)
    r = max(rank for rank in range(step, max(largest, step) + 1, step) if parameters(even(rank)) <= budget)
    uniform = {"r": r, "parameters": parameters(even(r)), "lost": lost(even(r))}
    if uniform["lost"] < lost(ranks):  # `allocate` may miss the best if experts make steps large
        ranks = even(r)
    return SuggestedRanks(ranks, budget, *as_pattern(ranks), parameters(ranks), lost(ranks), largest, uniform)


# ---- A checkpoint ----------------------------------------------------------------------------------------------------


class Report(NamedTuple):
    """All results for a model."""

    kinds: dict[str, Summary]
    """The layers of each kind, and "all", in the order of the model."""
    suggestion: SuggestedRanks
    numbers: dict[str, Any]
    """Everything as stored in JSON."""


def report(
    model: str | os.PathLike[str],
    ranks: Sequence[int],
    *,
    quant: str | None = None,
    budget: int | None = None,
    batch: int = 1,
    length: int = 512,
) -> Report:
    """Examines every matrix of a checkpoint that PiSSA would adapt, one after the other, with a bar on stderr. Spectra
    are computed up to the largest of `ranks`, or up to four times the smallest if that is more, so that a suggestion
    has a choice. The arguments are those of the command; `quant` is the format that the memory is computed for.

    Raises:
        OSError, ValueError: an error that names file, tensor or argument.
    """
    started = time.perf_counter()
    ranks = sorted(set(ranks))
    rank, known = ranks[0], max(ranks[-1], 4 * ranks[0])
    # Suggested ranks are multiples of 8, or of less, so that `rank` is a multiple and some layers can get less.
    step = math.gcd(8, rank) if math.gcd(8, rank) < rank else max(1, rank // 2)
    source = Checkpoint.open(model)
    plan = SplitPlan(source, PissaConfig(r=1))
    form = PissaConfig(quant=quant).form
    planned = list(plan.layers.values())
    config = model_config(source.folder).get_text_config()
    memory = training_memory(
        {layer.name: layer.shape for layer in planned},
        rank,
        weights=sum(source.nbytes(name) for name in (plan.copied if quant else source.names))
        + sum(quantised_bytes(layer.shape, form) for layer in planned if quant),
        dtype=planned[0].dtype,
        hidden=config.hidden_size,
        tokens=batch * length,
    )
    kept = _formats(source)
    sides = [(min(layer.shape), sum(layer.shape)) for layer in planned]
    if budget is None:
        budget = sum(min(rank, side) * cost for side, cost in sides)
    check_budget(sides, budget, step)
    reports: dict[str, LayerReport] = {}
    total = sum(math.prod(layer.shape) for layer in planned)
    with tqdm(total=total, desc="report", unit="parameters", unit_scale=True) as bar:
        for layer, following in itertools.zip_longest(planned, planned[1:]):
            if following is not None:
                source.ahead(following.tensors)
            reports[layer.name] = layer_report(layer.name, source.matrix(layer.parts), known)
            source.release(layer.tensors)
            bar.update(math.prod(layer.shape))
    groups = [factors.layers for factors in plan.factors]
    layers = [reports[name] for name in itertools.chain(*groups)]
    kinds = by_kind(layers)
    suggestion = suggest(layers, budget, step, groups)
    numbers = {
        "model": os.fspath(model),
        "quant": quant,
        "ranks": ranks,
        "seconds": time.perf_counter() - started,
        "total": {"energy": Summary(layers).energies(ranks)},
        "kinds": {
            kind: {"layers": len(summary.layers), "energy": summary.energies(ranks)} for kind, summary in kinds.items()
        },
        "suggestion": {name: value for name, value in suggestion._asdict().items() if name != "ranks"},
        "formats": kept,
        "memory": {"batch": batch, "length": length, "rank": rank, **memory},
    }
    return Report(kinds | {"all": Summary(layers)}, suggestion, numbers)


def _formats(source: Checkpoint) -> dict[str, dict[str, float]]:
    """The formats of the tensors of a checkpoint: the number of tensors, their bytes, the bits per element."""
    sums = defaultdict[str, list[int]](lambda: [0, 0, 0])
    for name in source.names:
        counts = sums[source.format(name)]
        for index, value in enumerate((1, source.nbytes(name), math.prod(source.entry(name).shape))):
            counts[index] += value
    return {
        format: {"tensors": count, "bytes": size, "bits": 8 * size / elements if elements else 0.0}
        for format, (count, size, elements) in sorted(sums.items(), key=lambda item: -item[1][1])
    }
