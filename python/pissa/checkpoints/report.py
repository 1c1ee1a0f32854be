"""What a checkpoint holds for PiSSA, read matrix by matrix: spectra, the errors of quantised bases, ranks for a budget
of parameters, the memory of training."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pissa import ops
from pissa.checkpoints.budget import Candidate, allocate, as_pattern, check_budget, kinds_of, sample
from pissa.checkpoints.init import SplitPlan
from pissa.checkpoints.load import of_layer
from pissa.checkpoints.training_memory import training_memory
from pissa.config import Form, PissaConfig
from pissa.files.hub import checkpoint_folder
from pissa.files.model_folder import model_config
from pissa.files.tensor_file import Source

Method = tuple[str, int]
"""A way to quantise and its rank, 0 if it has no factors."""

PLAIN = "QLoRA"
METHODS: dict[str, dict[str, Any]] = {"QPiSSA T=1": {}, "QPiSSA T=5": {"quant_iters": 5}}
"""The ways to quantise with factors, and what `ops.split` is told; plain quantisation is called `PLAIN`."""

# Rows and columns of a weight that are copied to float64 at once.
_ROWS = 256
_COLUMNS = 2048


# ---- One layer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerReport:
    """What was found out about the weight [out, in] of one layer."""

    name: str
    shape: tuple[int, int]
    values: Tensor
    """The singular values, float64 [k], descending: all of them, or the leading ones."""
    total: float
    """The square of the Frobenius norm: the sum of the squares of all singular values."""
    errors: dict[Method, float]
    """‖W - Q - s B A‖², Frobenius. Empty if nothing was to be quantised."""

    def rank(self, wanted: int) -> int:
        """The rank that the layer gets where `wanted` is asked for: at most its smaller side."""
        return min(wanted, *self.shape)

    def parameters(self, rank: int) -> int:
        """The number of parameters that an adapter of that rank trains here."""
        return self.rank(rank) * sum(self.shape)

    def lost(self, rank: int) -> float:
        """The part of `total` that the first `rank` singular values leave."""
        return max(self.total - float(self.values[:rank].square().sum()), 0.0)

    def energy(self, rank: int) -> float:
        """The share of the squared norm that `rank` directions hold; 1 of a weight of zeros."""
        return Summary([self]).energy(rank)

    @property
    def stable_rank(self) -> float:
        """`total` in units of the square of the largest singular value: small if few directions dominate."""
        largest = float(self.values[0]) ** 2
        return self.total / largest if largest else 0.0


def layer_report(
    name: str, weight: Tensor, known: int, ranks: Iterable[int] = (), quant: str | None = None, exact: bool = False
) -> LayerReport:
    """Looks at the weight [out, in] of a layer, float32, bfloat16 or float16.

    Args:
        known: how many singular values are wanted; of a smaller matrix, all.
        ranks: of the factors, where something is quantised.
        quant: the format of which errors are wanted.
        exact: compute all singular values, in float64. That is slow: for 4096 x 11008 in bfloat16 one thread took 10 s
            in float32 already, where 16 leading values take it 0.25 s.

    Without `exact` the values are those of `ops.svd_lowrank`: never above the true ones, and what factors of PiSSA
    really hold.

    Raises:
        ValueError: NaN or Inf, naming the layer.
    """
    with of_layer(name):
        if exact:
            values = singular_values(weight)
        else:
            _, values, _ = ops.svd_lowrank(weight, min(known, *weight.shape))
        errors = {} if quant is None else quant_errors(weight, quant, ranks)
    return LayerReport(name, (weight.shape[0], weight.shape[1]), values.double().cpu(), norm_squared(weight), errors)


def norm_squared(weight: Tensor) -> float:
    """The square of the Frobenius norm, summed in float64."""
    return float(sum(rows.double().square_().sum() for rows in torch.split(weight, _ROWS)))


def singular_values(weight: Tensor) -> Tensor:
    """All singular values, float64 [min(out, in)], descending: roots of the eigenvalues of the Gram matrix in float64,
    right to about 1e-8 of the largest. torch.linalg.svdvals takes six times as long for 1024 x 2816."""
    wide = weight if weight.shape[0] <= weight.shape[1] else weight.mT
    gram = torch.zeros(wide.shape[0], wide.shape[0], dtype=torch.float64, device=weight.device)
    for part in torch.split(wide, _COLUMNS, dim=1):
        columns = part.double()
        gram.addmm_(columns, columns.mT)
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram)
    return eigenvalues.flip(0).clamp(min=0).sqrt()


def quant_errors(weight: Tensor, format: str, ranks: Iterable[int]) -> dict[Method, float]:
    """The errors of a weight [out, in] in `format`, ‖W - Q - s B A‖², Frobenius. Each needs a float32 copy of the
    weight. A weight with a side that is smaller than a rank gets that side as its rank."""
    errors = {(PLAIN, 0): norm_squared(ops.dequantize(ops.quantize(weight, format)).sub_(weight))}
    for rank, (name, options) in itertools.product(ranks, METHODS.items()):
        split = ops.split(weight, min(rank, *weight.shape), form=format, **options)
        assert isinstance(split.residual, ops.QuantizedWeight)
        errors[name, rank] = norm_squared(ops.dequantize(split.residual).addmm_(split.b0, split.a0).sub_(weight))
    return errors


# ---- Several layers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Several layers together."""

    layers: Sequence[LayerReport]

    def energy(self, rank: int) -> float:
        """The share of the squared norm that `rank` directions in each layer hold; 1 of weights of zeros."""
        total = sum(layer.total for layer in self.layers)
        return 1 - sum(layer.lost(rank) for layer in self.layers) / total if total else 1.0

    @property
    def quantised(self) -> list[LayerReport]:
        """The layers whose errors are known."""
        return [layer for layer in self.layers if layer.errors]

    @property
    def methods(self) -> list[Method]:
        """The methods whose errors are known."""
        return list(dict.fromkeys(method for layer in self.layers for method in layer.errors))

    def error(self, method: Method = (PLAIN, 0)) -> float:
        """The Frobenius norm of the error, in units of that of the weights; 0 for weights of zeros."""
        total = sum(layer.total for layer in self.quantised)
        return math.sqrt(sum(layer.errors[method] for layer in self.quantised) / total) if total else 0.0

    def removed(self, method: Method) -> float:
        """The share of plain quantisation's error that is gone."""
        plain = self.error()
        return 1 - self.error(method) / plain if plain else 0.0

    def as_dict(self, ranks: Iterable[int]) -> dict[str, Any]:
        """Energies at these ranks, and the errors that are known."""
        numbers: dict[str, Any] = {"energy": {str(rank): self.energy(rank) for rank in ranks}}
        if self.quantised:
            numbers["errors"] = [
                {"method": name, "rank": rank, "error": self.error((name, rank)), "removed": self.removed((name, rank))}
                for name, rank in self.methods
            ]
        return numbers


def by_kind(layers: Sequence[LayerReport]) -> dict[str, Summary]:
    """The layers of each kind together."""
    members: dict[str, list[LayerReport]] = {}
    for layer, kind in zip(layers, kinds_of(layer.name for layer in layers).values(), strict=True):
        members.setdefault(kind, []).append(layer)
    return {kind: Summary(some) for kind, some in members.items()}


# ---- Ranks for a budget ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SuggestedRanks:
    """Ranks for a budget of parameters, beside one rank for all layers."""

    budget: int
    ranks: dict[str, int]
    """Of each layer."""
    r: int
    rank_pattern: dict[str, int]
    """With `r`, the fields of a PissaConfig that gives the layers these ranks."""
    parameters: int
    lost: float
    """The share of the energy that the ranks leave, each kind's weighted by its error if something is quantised."""
    largest_rank: int
    """The largest rank that was looked at. A layer that has it might want more."""
    uniform: dict[str, Any]
    """The same of the largest rank, a multiple of 8 if it can be, that the budget allows in all layers: "r",
    "parameters", "lost"."""

    def as_dict(self) -> dict[str, Any]:
        """Everything but the rank of each layer, which the pattern has."""
        return {name: value for name, value in vars(self).items() if name != "ranks"}


def suggest(
    layers: Sequence[LayerReport], budget: int, step: int = 8, together: Sequence[Sequence[str]] | None = None
) -> SuggestedRanks:
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
        layer.name: summary.error() ** 2 if summary.quantised else 1.0
        for summary in by_kind(layers).values()
        for layer in summary.layers
    }
    by_name = {layer.name: layer for layer in layers}
    groups = together or [[name] for name in by_name]
    candidates = []
    for names in groups:
        gains = torch.stack([weights[name] * by_name[name].values.square() for name in names]).sum(0)
        candidates.append(Candidate(gains.tolist(), sum(sum(by_name[name].shape) for name in names)))
    allocated = allocate(candidates, budget, step)
    ranks = {name: rank for names, rank in zip(groups, allocated, strict=True) for name in names}
    largest = max(len(layer.values) for layer in layers)
    steps = range(step, max(largest, step) + 1, step)
    uniform = max(rank for rank in steps if sum(layer.parameters(rank) for layer in layers) <= budget)
    even = {layer.name: layer.rank(uniform) for layer in layers}

    def parameters(chosen: Mapping[str, int]) -> int:
        return sum(layer.parameters(chosen[layer.name]) for layer in layers)

    def lost(chosen: Mapping[str, int]) -> float:
        whole = sum(weights[layer.name] * layer.total for layer in layers)
        rest = sum(weights[layer.name] * layer.lost(chosen[layer.name]) for layer in layers)
        return rest / whole if whole else 0.0

    if lost(even) < lost(ranks):  # what `allocate` may lack of the best, if experts make steps large
        ranks = even
    uniformly = {"r": uniform, "parameters": parameters(even), "lost": lost(even)}
    return SuggestedRanks(budget, ranks, *as_pattern(ranks), parameters(ranks), lost(ranks), largest, uniformly)


# ---- A checkpoint ----------------------------------------------------------------------------------------------------


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
    layers: list[LayerReport]
    """In the order of the model."""
    suggestion: SuggestedRanks
    memory: dict[str, Any]
    """Of training at a "rank": bytes by what takes them, "plain" and with gradient "checkpointing"."""
    seconds: float

    @property
    def summaries(self) -> dict[str, Summary]:
        """The layers of each kind, and "all"."""
        return {**by_kind(self.layers), "all": Summary(self.layers)}

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON has it: numbers, texts, lists and objects with names."""
        kinds = self.summaries
        total = kinds.pop("all").as_dict(self.ranks)
        return {
            "model": self.model,
            "quant": self.quant,
            "ranks": list(self.ranks),
            "exact": self.exact,
            "seconds": self.seconds,
            "total": total,
            "kinds": {kind: {"layers": len(some.layers), **some.as_dict(self.ranks)} for kind, some in kinds.items()},
            "layers": {
                layer.name: {
                    "shape": list(layer.shape),
                    "norm": math.sqrt(layer.total),
                    "stable_rank": layer.stable_rank,
                    "singular_values": layer.values.tolist(),
                    **Summary([layer]).as_dict(self.ranks),
                }
                for layer in self.layers
            },
            "suggestion": self.suggestion.as_dict(),
            "memory": self.memory,
        }


def report(
    model: str | os.PathLike[str],
    ranks: Sequence[int],
    *,
    quant: str | None = None,
    budget: int | None = None,
    sampled: int | None = None,
    exact: bool = False,
    batch: int = 1,
    length: int = 512,
) -> Report:
    """Looks at every matrix of a checkpoint that PiSSA would adapt, one after the other, with a bar on stderr. Spectra
    are known up to the largest of `ranks`, or up to four times the smallest if that is more, so that a suggestion has a
    choice. The arguments are those of the command.

    Raises:
        OSError, ValueError: naming file, tensor or argument.
    """
    started = time.perf_counter()
    ranks = sorted(set(ranks))
    known = max(ranks[-1], 4 * ranks[0])
    with Source(checkpoint_folder(model)) as source:
        plan = SplitPlan(source, PissaConfig(r=1))
        planned = list(plan.layers.values())
        memory = _memory(plan, ranks[0], quant, batch, length)
        sides = [(min(layer.shape), sum(layer.shape)) for layer in planned]
        if budget is None:
            budget = sum(min(ranks[0], side) * cost for side, cost in sides)
        check_budget(sides, budget, _step(ranks[0]))
        chosen = sample(kinds_of(plan.layers), sampled) if sampled else plan.layers.keys()
        found: dict[str, LayerReport] = {}
        total = sum(math.prod(layer.shape) for layer in planned)
        with tqdm(total=total, desc="report", unit="parameters", unit_scale=True) as bar:
            for layer, following in itertools.zip_longest(planned, planned[1:]):
                if following is not None:
                    source.ahead(following.tensors)
                format = quant if layer.name in chosen else None
                found[layer.name] = layer_report(layer.name, layer.matrix(source), known, ranks, format, exact)
                source.release(layer.tensors)
                bar.update(math.prod(layer.shape))
    groups = [factors.layers for factors in plan.factors]
    layers = [found[name] for name in itertools.chain(*groups)]
    suggestion = suggest(layers, budget, _step(ranks[0]), groups)
    seconds = time.perf_counter() - started
    return Report(os.fspath(model), quant, ranks, known, exact, layers, suggestion, memory, seconds)


def _step(rank: int) -> int:
    """Suggested ranks are multiples of 8; or of less, so that `rank` is one and some layers can get less."""
    step = math.gcd(8, rank)
    return step if step < rank else max(1, rank // 2)


def _memory(plan: SplitPlan, rank: int, quant: str | None, batch: int, length: int) -> dict[str, Any]:
    form = Form("implicit") if quant is None else Form.quantised(quant, PissaConfig.blocksize, PissaConfig.double_quant)
    config = model_config(plan.source.folder).get_text_config()
    layers = list(plan.layers.values())
    sizes: dict[str, Any] = {
        "rest": sum(plan.source.entry(name).nbytes for name in plan.copied),
        "dtype": layers[0].dtype,
        "hidden": config.hidden_size,
        "vocabulary": config.vocab_size,
        "tokens": batch * length,
    }
    shapes = {layer.name: layer.shape for layer in layers}
    return {
        "batch": batch,
        "length": length,
        "rank": rank,
        "plain": training_memory(shapes, rank, form, **sizes, checkpointing=False),
        "checkpointing": training_memory(shapes, rank, form, **sizes, checkpointing=True),
    }
