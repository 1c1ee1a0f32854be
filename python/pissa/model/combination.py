"""Weighted sums of adapters: the sum of their changes of each weight, as the factors of one new adapter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from pissa import distributed
from pissa.base.start import Served
from pissa.config import PissaConfig, exactly
from pissa.layers.layer import PissaLayer, pissa_layers
from pissa.ops.low_rank import Spectrum

COMBINATIONS = ("svd", "linear", "cat")

Terms = Sequence[tuple[str, float]]
"""The adapters of a sum, each with its weight."""


def config_of_sum(
    model: nn.Module, configs: Mapping[str, PissaConfig], terms: Terms, combination_type: str, svd_rank: int | None
) -> PissaConfig:
    """The configuration of the adapter that `PissaModel.add_weighted_adapter` adds to the (unwrapped) model. Raises
    ValueError for an argument that is invalid, and for an adapter that trains more than factors."""
    for adapter, weight in terms:
        if adapter not in configs:
            raise ValueError(f"Adapter {adapter} does not exist; the model has {', '.join(configs)}")
        plain = {"use_dora": False, "bias": "none", "trainable_token_indices": None, "modules_to_save": None}
        for name, needed in plain.items():
            if (value := getattr(configs[adapter], name)) != needed:
                raise ValueError(
                    f"add_weighted_adapter sums the factors of adapters, and {adapter} has {name}={value!r}, which "
                    "trains more than factors: merge it with merge_and_unload"
                )
        if not math.isfinite(weight):
            raise ValueError(f"weights must be finite numbers, got {weight!r}")
    if combination_type not in COMBINATIONS:
        raise ValueError(
            f"Invalid combination_type: {combination_type!r}; allowed: {', '.join(COMBINATIONS)}. For sums that "
            "prune, write a model of each adapter with `pissa merge`, and give them to a tool that merges models"
        )
    if svd_rank is not None and svd_rank < 1:
        raise ValueError(f"svd_rank must be a positive integer or None, got {svd_rank!r}")
    names = [adapter for adapter, _ in terms]
    layers = {path: layer for adapter in names for path, layer in pissa_layers(model, adapter).items()}
    ranks = {path: [_served(layer, name).rank for name in names if name in layer.r] for path, layer in layers.items()}
    limit = max(rank for of_layer in ranks.values() for rank in of_layer)
    if combination_type != "linear":
        limit = svd_rank or (limit if combination_type == "svd" else sum(map(sum, ranks.values())))
    new = {path: min(limit, sum(ranks[path]), *layer.matrix_shape) for path, layer in layers.items()}
    ((r, _),) = Counter(new.values()).most_common(1)
    first = configs[names[0]]
    config = PissaConfig(
        r=r,
        rank_pattern={exactly(path): rank for path, rank in new.items() if rank != r},
        target_modules=set(new),
        init="given",
        lora_dropout=first.lora_dropout,
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
    )
    # PEFT also treats a name as a target if it ends with one of these.
    config.exclude_modules = {
        path for path, _ in model.named_modules() if path not in new and check_target_module_exists(config, path)
    } or None
    return config


@torch.no_grad()
def set_to_sum(model: nn.Module, adapter_name: str, terms: Terms) -> None:
    """Gives an adapter that starts at zero the factors of the sum. All processes get those of rank 0; each may round an
    SVD differently."""
    layers = pissa_layers(model, adapter_name)
    sums = {name: _sum(layer, terms, layer.r[adapter_name]) for name, layer in layers.items()}
    distributed.agree()  # from here to the last broadcast, no rank can fail by itself
    for name, layer in layers.items():
        for delta, factor in zip(layer.deltas(adapter_name), sums.pop(name), strict=True):
            delta.copy_(distributed.broadcast(factor, 0))


def _served(layer: PissaLayer, adapter: str) -> Served:
    return Served.of(layer.start_of(adapter), layer.scaling[adapter])


def _sum(layer: PissaLayer, terms: Terms, rank: int) -> tuple[Tensor, Tensor]:
    """The factors a [rank, in] and b [out, rank] of the sum, or of its best approximation of that rank, float32."""
    own = [(adapter, weight * layer.scaling[adapter]) for adapter, weight in terms if adapter in layer.r]
    pairs = [_served(layer, adapter).factors(layer.deltas(adapter)) for adapter, _ in own]
    a = torch.cat([scale * a for (_, scale), (a, _) in zip(own, pairs, strict=True)])
    b = torch.cat([b for _, b in pairs], dim=1)
    if len(a) > rank:
        spectrum = Spectrum.of(a.double(), b.double())
        a, b = spectrum.right[:rank], spectrum.left[:, :rank] * spectrum.values[:rank]  # a can learn where b is zero
    return a.float().contiguous(), b.float().contiguous()
