"""Reports what a checkpoint offers PiSSA, read matrix by matrix: spectra, and the memory of training."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pissa import ops
from pissa.checkpoints.init import SplitPlan
from pissa.checkpoints.load import of_layer
from pissa.checkpoints.training_memory import quantised_bytes, training_memory
from pissa.config import PissaConfig
from pissa.containers.checkpoint import Checkpoint

# Rows of a weight that are copied to float64 at once.
_ROWS = 256


def energies(name: str, weight: Tensor, ranks: Sequence[int]) -> Tensor:
    """The squared Frobenius norm of a layer's weight [out, in], float32, bfloat16 or float16, and the part of it that
    its leading directions hold, as many as each of the ascending ranks says: float64 [1 + ranks]. The directions are
    those of `ops.svd_lowrank`: they never hold more than the true ones, and are what PiSSA's factors really hold.

    Raises:
        ValueError: the weight contains NaN or Inf. The message names the layer.
    """
    with of_layer(name):
        _, values, _ = ops.svd_lowrank(weight, min(ranks[-1], *weight.shape))
    total = sum((rows.double().square_().sum() for rows in torch.split(weight, _ROWS)), torch.zeros(()))
    held = values.double().square().cumsum(0)
    return torch.stack([total, *(held[min(rank, len(held)) - 1] for rank in ranks)])


def shares(layers: Iterable[Tensor]) -> list[float]:
    """The shares of the layers' squared norms together that they hold at each rank; 1 for weights of zeros."""
    total, *held = torch.stack(list(layers)).sum(0).tolist()
    return [min(one / total, 1.0) if total else 1.0 for one in held]


def kinds_of(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of each kind of layers. A kind is what follows the last number in a name, such as "mlp.up_proj"."""
    kinds = defaultdict[str, list[str]](list)
    for name in names:
        kinds[re.sub(r"^.*\.\d+\.", "", name)].append(name)
    return dict(kinds)


def report(
    model: str | os.PathLike[str], ranks: Sequence[int], *, quant: str | None = None, batch: int = 1, length: int = 512
) -> dict[str, Any]:
    """Examines every matrix of a checkpoint that PiSSA would adapt, one after the other, with a bar on stderr. Spectra
    are computed up to the largest of `ranks`, and the memory at the smallest. The arguments are those of the command;
    `quant` is the format that the memory is computed for.

    Raises:
        OSError, ValueError: an error that names file, tensor or argument.
    """
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
        hidden=source.model.config.get_text_config().hidden_size,
        tokens=batch * length,
    )
    found: dict[str, Tensor] = {}
    total = sum(math.prod(layer.shape) for layer in planned)
    with tqdm(total=total, desc="report", unit="parameters", unit_scale=True) as bar:
        for layer, following in itertools.zip_longest(planned, planned[1:]):
            if following is not None:
                source.ahead(following.tensors)
            found[layer.name] = energies(layer.name, source.matrix(layer.parts), ranks)
            source.release(layer.tensors)
            bar.update(math.prod(layer.shape))
    names = [name for factors in plan.factors for name in factors.layers]  # in the order of the model
    kinds = kinds_of(names) | {"all": names}
    return {
        "model": os.fspath(model),
        "quant": quant,
        "ranks": ranks,
        "parameters": total,
        "kinds": {
            kind: {
                "layers": len(of_kind),
                "energy": dict(zip(map(str, ranks), shares(found[name] for name in of_kind), strict=True)),
            }
            for kind, of_kind in kinds.items()
        },
        "memory": {"batch": batch, "length": length, "rank": ranks[0], **memory},
    }
