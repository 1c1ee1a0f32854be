"""Reports what a checkpoint offers PiSSA, read matrix by matrix: spectra, and the memory of training."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pissa import ops
from pissa.checkpoints.init import SplitPlan
from pissa.checkpoints.load import of_layer
from pissa.checkpoints.training_memory import quantised_bytes, training_memory
from pissa.config import PissaConfig
from pissa.containers.checkpoint import Checkpoint
from pissa.containers.model_folder import model_config

# Rows of a weight that are copied to float64 at once.
_ROWS = 256


class LayerReport(NamedTuple):
    """The results for the weight of one layer."""

    values: Tensor
    """The leading singular values, float64 [k], descending."""
    total: float
    """The squared Frobenius norm, which is the sum of the squares of all singular values."""


def layer_report(name: str, weight: Tensor, known: int) -> LayerReport:
    """Examines the weight [out, in] of a layer, float32, bfloat16 or float16. The `known` leading values are those of
    `ops.svd_lowrank`: never above the true ones, and what PiSSA's factors really hold.

    Raises:
        ValueError: the weight contains NaN or Inf. The message names the layer.
    """
    with of_layer(name):
        _, values, _ = ops.svd_lowrank(weight, min(known, *weight.shape))
    total = float(sum(rows.double().square_().sum() for rows in torch.split(weight, _ROWS)))
    return LayerReport(values.double().cpu(), total)


def energy(layers: Iterable[LayerReport], rank: int) -> float:
    """The share of the layers' squared norm that `rank` directions in each hold; 1 for weights of zeros."""
    total = lost = 0.0
    for layer in layers:
        total += layer.total
        lost += max(layer.total - float(layer.values[:rank].square().sum()), 0.0)
    return 1 - lost / total if total else 1.0


def kinds_of(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of each kind of layers. A kind is what follows the last number in a name, as short as distinguishes the
    kinds: "q_proj", or "attn.c_proj" and "mlp.c_proj"."""
    by_ending = defaultdict[tuple[str, ...], list[str]](list)
    for name in names:
        parts = name.split(".")
        start = max((i + 1 for i, part in enumerate(parts[:-1]) if part.isdigit()), default=0)
        by_ending[tuple(parts[start:])].append(name)
    kinds = {}
    for ending, of_kind in by_ending.items():
        lengths = range(1, len(ending) + 1)
        alone = (n for n in lengths if not any(other[-n:] == ending[-n:] for other in by_ending if other != ending))
        kinds[".".join(ending[-next(alone, len(ending)) :])] = of_kind
    return kinds


def report(
    model: str | os.PathLike[str], ranks: Sequence[int], *, quant: str | None = None, batch: int = 1, length: int = 512
) -> dict[str, Any]:
    """Examines every matrix of a checkpoint that PiSSA would adapt, one after the other, with a bar on stderr. Spectra
    are computed up to the largest of `ranks`, and the memory at the smallest. The arguments are those of the command;
    `quant` is the format that the memory is computed for.

    Raises:
        OSError, ValueError: an error that names file, tensor or argument.
    """
    started = time.perf_counter()
    ranks = sorted(set(ranks))
    source = Checkpoint.open(model)
    plan = SplitPlan(source, PissaConfig(r=1))
    form = PissaConfig(quant=quant).form
    planned = list(plan.layers.values())
    memory = training_memory(
        {layer.name: layer.shape for layer in planned},
        ranks[0],
        weights=sum(source.nbytes(name) for name in (plan.copied if quant else source.names))
        + sum(quantised_bytes(layer.shape, form) for layer in planned if quant),
        dtype=planned[0].dtype,
        hidden=model_config(source.folder).get_text_config().hidden_size,
        tokens=batch * length,
    )
    reports: dict[str, LayerReport] = {}
    total = sum(math.prod(layer.shape) for layer in planned)
    with tqdm(total=total, desc="report", unit="parameters", unit_scale=True) as bar:
        for layer, following in itertools.zip_longest(planned, planned[1:]):
            if following is not None:
                source.ahead(following.tensors)
            reports[layer.name] = layer_report(layer.name, source.matrix(layer.parts), ranks[-1])
            source.release(layer.tensors)
            bar.update(math.prod(layer.shape))
    names = [name for factors in plan.factors for name in factors.layers]  # in the order of the model
    kinds = kinds_of(names) | {"all": names}
    return {
        "model": os.fspath(model),
        "quant": quant,
        "ranks": ranks,
        "seconds": time.perf_counter() - started,
        "parameters": total,
        "kinds": {
            kind: {
                "layers": len(of_kind),
                "energy": {str(rank): energy([reports[name] for name in of_kind], rank) for rank in ranks},
            }
            for kind, of_kind in kinds.items()
        },
        "formats": _formats(source),
        "memory": {"batch": batch, "length": length, "rank": ranks[0], **memory},
    }


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
