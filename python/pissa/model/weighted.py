"""Weighted sums of adapters: their changes of each weight, side by side in the factors of one new adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from pissa.config import PissaConfig, exactly
from pissa.layers.layer import pissa_layers

Terms = Sequence[tuple[str, float]]
"""The adapters of a sum, each with its weight."""

_FACTORS_ONLY = {
    **{"use_dora": False, "bias": "none", "merge_aware": False},
    **{"modules_to_save": None, "trainable_token_indices": None},
}
"""The fields of a configuration whose adapter is nothing but a low-rank change."""


def config_of_sum(model: nn.Module, configs: Mapping[str, PissaConfig], terms: Terms) -> PissaConfig:
    """The configuration of the adapter that is a sum of others in the (unwrapped) model. Raises ValueError for a term
    that is invalid, and for an adapter that is more than a low-rank change."""
    for adapter, weight in terms:
        if adapter not in configs:
            raise ValueError(f"adapters: got {adapter!r}; the model has {', '.join(map(repr, configs))}")
        for name, needed in _FACTORS_ONLY.items():
            if (value := getattr(configs[adapter], name)) != needed:
                raise ValueError(
                    f"adapters: {adapter!r} has {name}={value!r}, so it is more than a low-rank change and has no "
                    "sum with others: merge it instead, with merge_and_unload or `pissa merge`"
                )
        if not math.isfinite(weight):
            raise ValueError(f"weights: got {weight!r}; allowed: finite numbers")
    ranks: dict[str, int] = {}
    for adapter, _ in terms:
        for path, layer in pissa_layers(model, adapter).items():
            ranks[path] = min(ranks.get(path, 0) + layer.starts(adapter).rank_on("original"), *layer.matrix_shape)
    r = max(ranks.values())
    config = PissaConfig(
        r=r,
        rank_pattern={exactly(path): rank for path, rank in ranks.items() if rank != r},
        target_modules=set(ranks),
        init="given",
        task_type=configs[terms[0][0]].task_type,
        base_model_name_or_path=configs[terms[0][0]].base_model_name_or_path,
    )
    # For PEFT, a name that ends with one of these is a target, too.
    config.exclude_modules = {
        path for path, _ in model.named_modules() if path not in ranks and check_target_module_exists(config, path)
    } or None
    return config


@torch.no_grad()
def set_to_sum(model: nn.Module, adapter_name: str, terms: Terms) -> None:
    """Gives an adapter that starts at zero, with scaling 1, the factors of the sum."""
    for layer in pissa_layers(model, adapter_name).values():
        own = [(adapter, weight * layer.scaling[adapter]) for adapter, weight in terms if adapter in layer.r]
        pairs = [layer.starts(adapter).factors_on("original", layer.deltas(adapter)) for adapter, _ in own]
        a = torch.cat([scale * a for (_, scale), (a, _) in zip(own, pairs, strict=True)])
        b = torch.cat([b for _, b in pairs], dim=1)
        if len(a) > layer.r[adapter_name]:  # the rank is a side of the weight: the sum itself, beside the identity
            identity = torch.eye(layer.r[adapter_name], device=a.device)
            a, b = (b @ a, identity) if len(b) <= a.shape[1] else (identity, b @ a)
        for delta, factor in zip(layer.deltas(adapter_name), (a, b), strict=True):
            delta.copy_(factor)
