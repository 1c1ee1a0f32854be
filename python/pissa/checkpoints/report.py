"""`pissa.checkpoints.report`: what a model's folder holds for PiSSA, read matrix by matrix."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm import tqdm

from pissa.checkpoints.budget import check_budget, kinds_of, sample
from pissa.checkpoints.layer_report import LayerReport, Summary, by_kind, layer_reports
from pissa.checkpoints.split_plan import SplitPlan
from pissa.checkpoints.suggestion import Suggestion, suggest
from pissa.checkpoints.training_memory import ModelSizes, Shape, TrainingMemory, training_memory
from pissa.config import Form, PissaConfig
from pissa.files.model_folder import model_config
from pissa.files.source import Source


@dataclass(frozen=True)
class Report:
    """Everything that was found out about a model."""

    model: str
    quant: str | None
    ranks: Sequence[int]
    """Ascending."""
    known: int
    """How many singular values of each layer are known, if it has as many."""
    exact: bool
    sizes: ModelSizes
    layers: list[LayerReport]
    suggestion: Suggestion
    batch: int
    length: int
    memory: dict[bool, TrainingMemory]
    """Of training at the first rank, without and with gradient checkpointing."""
    seconds: float

    @property
    def whole(self) -> Summary:
        """All layers together."""
        return Summary(self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON has it: numbers, texts, lists and objects with names."""
        layers = {}
        for layer in self.layers:
            kind = Summary([layer])
            layers[layer.name] = {
                "shape": list(layer.shape),
                "norm": math.sqrt(layer.spectrum.total),
                "stable_rank": layer.spectrum.stable_rank,
                "singular_values": layer.spectrum.values.tolist(),
                **self._numbers(kind),
            }
        r, pattern = self.suggestion.pattern()
        memory = {"checkpointing" if key else "plain": value for key, value in self.memory.items()}
        return {
            "model": self.model,
            "quant": self.quant,
            "ranks": list(self.ranks),
            "exact": self.exact,
            "seconds": self.seconds,
            "total": self._numbers(self.whole),
            "kinds": {
                kind: {"layers": len(some.layers), **self._numbers(some)} for kind, some in by_kind(self.layers).items()
            },
            "layers": layers,
            "suggestion": {
                "budget": self.suggestion.budget,
                "r": r,
                "rank_pattern": pattern,
                "parameters": self.suggestion.parameters,
                "lost": self.suggestion.lost,
                "largest_rank": self.suggestion.largest,
                "uniform": {
                    "r": self.suggestion.uniform,
                    "parameters": self.suggestion.uniform_parameters,
                    "lost": self.suggestion.uniform_lost,
                },
            },
            "memory": {
                "batch": self.batch,
                "length": self.length,
                "rank": self.ranks[0],
                **{name: {**vars(value), "total": value.total} for name, value in memory.items()},
            },
        }

    def _numbers(self, some: Summary) -> dict[str, Any]:
        numbers: dict[str, Any] = {"energy": {str(rank): some.energy(rank) for rank in self.ranks}}
        if some.quantised:
            numbers["errors"] = [
                {"method": name, "rank": rank, "error": some.error((name, rank)), "removed": some.removed((name, rank))}
                for name, rank in some.methods
            ]
        return numbers


def report(
    folder: str | os.PathLike[str],
    ranks: Sequence[int],
    *,
    quant: str | None = None,
    budget: int | None = None,
    sampled: int | None = None,
    exact: bool = False,
    batch: int = 1,
    length: int = 512,
    progressbar: bool = False,
) -> Report:
    """Looks at every matrix of a checkpoint that PiSSA would adapt, one after the other.

    Args:
        folder: of the model: config.json and safetensors.
        ranks: of adapters. Spectra are known up to the largest, or up to four times the smallest if that is more, so
            that a suggestion has a choice.
        quant: "nf4" or "int8": report the errors of bases in that format too.
        budget: trained parameters that the suggested ranks may have; by default as many as the smallest of `ranks` has.
        sampled: quantise only so many layers of each kind, evenly spaced.
        exact: compute all singular values.
        batch, length: sequences and tokens of a step, for the memory of training.

    Raises:
        OSError, ValueError: naming file, tensor or argument.
    """
    started = time.perf_counter()
    ranks = sorted(set(ranks))
    known = max(ranks[-1], 4 * ranks[0])
    with Source.open(folder) as source:
        plan = SplitPlan.of(source, PissaConfig(r=1))
        sizes = _sizes(source, plan)
        sides = [(min(layer.shape), sum(layer.shape)) for layer in plan.layers.values()]
        if budget is None:
            budget = sum(min(ranks[0], side) * cost for side, cost in sides)
        check_budget(sides, budget, _step(ranks[0]))
        chosen = sample(kinds_of(plan.layers), sampled) if sampled else plan.layers.keys()
        found = layer_reports(
            _matrices(source, plan), known, ranks, quant=quant, quantised=lambda name: name in chosen, exact=exact
        )
        layers = []
        total = sum(math.prod(layer.shape) for layer in plan.layers.values())
        bar = tqdm(total=total, desc="report", unit="parameters", unit_scale=True) if progressbar else None
        with bar or nullcontext():
            for layer in found:
                layers.append(layer)
                if bar is not None:
                    bar.update(math.prod(layer.shape))
    groups = [factors.layers for factors in plan.factors]
    order = {name: number for number, name in enumerate(itertools.chain(*groups))}  # the model's
    layers.sort(key=lambda layer: order[layer.name])
    form = Form("implicit") if quant is None else Form.quantised(quant, PissaConfig.blocksize, PissaConfig.double_quant)
    adapters = [Shape(layer.name, *layer.shape, layer.rank(ranks[0])) for layer in layers]
    memory = {
        checkpointing: training_memory(adapters, sizes, form, batch=batch, length=length, checkpointing=checkpointing)
        for checkpointing in (False, True)
    }
    suggestion = suggest(layers, budget, _step(ranks[0]), groups)
    seconds = time.perf_counter() - started
    return Report(
        os.fspath(folder), quant, ranks, known, exact, sizes, layers, suggestion, batch, length, memory, seconds
    )


def _step(rank: int) -> int:
    """Suggested ranks are multiples of 8; or of less, so that `rank` is one and some layers can get less."""
    step = math.gcd(8, rank)
    return step if step < rank else max(1, rank // 2)


def _matrices(source: Source, plan: SplitPlan) -> Iterator[tuple[str, Tensor]]:
    """The matrix of each layer; its pages are given back when the next one is asked for."""
    layers = list(plan.layers.values())
    for layer, following in itertools.zip_longest(layers, layers[1:]):
        if following is not None:
            source.ahead(following.tensors)
        yield layer.name, layer.matrix(source)
        source.release(layer.tensors)


def _sizes(source: Source, plan: SplitPlan) -> ModelSizes:
    config = model_config(source.folder).get_text_config()
    rest = sum(source.entry(name).nbytes for name in plan.copied)
    dtype = next(iter(plan.layers.values())).dtype
    return ModelSizes(rest, dtype, config.hidden_size, config.vocab_size)
