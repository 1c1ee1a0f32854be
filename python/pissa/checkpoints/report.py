"""`pissa.checkpoints.report`: what a model's folder holds for PiSSA, read matrix by matrix."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from pissa.checkpoints.kinds import kinds_of, sample
from pissa.checkpoints.layer_report import LayerReport, Summary, by_kind, layer_reports
from pissa.checkpoints.source import Source
from pissa.checkpoints.suggestion import Suggestion, suggest
from pissa.checkpoints.training_memory import ModelSizes, Shape, TrainingMemory, training_memory
from pissa.config import Form, PissaConfig
from pissa.layers.factory import choose_layers


@dataclass(frozen=True)
class Report:
    """Everything that was found out about a model."""

    model: str
    quant: str | None
    ranks: Sequence[int]
    """Ascending."""
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
            errors = numbers["errors"] = []
            for method, rank in some.methods:
                removed, standard_error = some.removed((method, rank))
                found = {"method": method, "rank": rank, "relative_error": some.error((method, rank))}
                errors.append({**found, "removed": removed, "removed_standard_error": standard_error})
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
        ranks: of adapters; all spectra are known up to the largest.
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
    checkpoint = _Checkpoint(Path(folder))
    shapes = checkpoint.shapes
    names = sample(kinds_of(shapes), sampled) if sampled else shapes
    layers = []
    total = sum(map(math.prod, shapes.values()))
    with tqdm(total=total, desc="report", unit="param", unit_scale=True) if progressbar else nullcontext() as bar:
        for layer in layer_reports(
            checkpoint.matrices(), ranks, quant=quant, quantised=lambda name: name in names, exact=exact
        ):
            layers.append(layer)
            if bar is not None:
                bar.update(math.prod(layer.shape))
    if budget is None:
        budget = sum(layer.parameters(ranks[0]) for layer in layers)
    form = Form("implicit") if quant is None else Form.quantised(quant, 64, True)
    adapters = [Shape(layer.name, *layer.shape, layer.rank(ranks[0])) for layer in layers]
    memory = {
        checkpointing: training_memory(
            adapters, checkpoint.sizes, form, batch=batch, length=length, checkpointing=checkpointing
        )
        for checkpointing in (False, True)
    }
    suggestion = suggest(layers, budget, _step(ranks[0]))
    seconds = time.perf_counter() - started
    return Report(
        os.fspath(folder), quant, ranks, exact, checkpoint.sizes, layers, suggestion, batch, length, memory, seconds
    )


def _step(rank: int) -> int:
    """Suggested ranks are multiples of 8; or of less, so that `rank` is one and some layers can get less."""
    step = math.gcd(8, rank)
    return step if step < rank else max(1, rank // 2)


class _Checkpoint:
    """The linear layers of a model, by its configuration; read one by one from the mapped files."""

    def __init__(self, folder: Path) -> None:
        self.source = Source.open(folder)
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        pissa = PissaConfig(r=1)
        choose_layers(model, pissa)
        self.shapes = {
            name: (module.weight.shape[0], module.weight.shape[1])
            for name, module in model.named_modules()
            if name in (pissa.target_modules or ())
        }
        entries = [self.source.entry(name) for name in self.source.names]
        adapted = [self.source.entry(f"{name}.weight") for name in self.shapes]
        text = config.get_text_config()
        rest = sum(entry.nbytes for entry in entries) - sum(entry.nbytes for entry in adapted)
        self.sizes = ModelSizes(rest, adapted[0].dtype, text.hidden_size, text.vocab_size)

    def matrices(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.shapes:
            yield name, self.source.read(f"{name}.weight")
            self.source.release([f"{name}.weight"])
