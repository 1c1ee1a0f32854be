"""Weighted combinations of adapters: the sum of their changes of each weight becomes the change of one new adapter."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from pissa import distributed
from pissa.base.start import StartFactors
from pissa.config import PissaConfig, exactly
from pissa.layers.layer import PissaLayer, pissa_layers
from pissa.ops.low_rank import Spectrum, pad_rank

COMBINATIONS = ("svd", "linear", "cat")

Parts = tuple[Tensor, Tensor, Tensor, Tensor]
"""a0, b0, dA and dB of a layer: float32 matrices for a scaling of 1."""


class Combination:
    """The arguments of `PissaModel.add_weighted_adapter`, checked against the (unwrapped) model and its adapters."""

    def __init__(
        self,
        model: nn.Module,
        configs: Mapping[str, PissaConfig],
        adapters: Sequence[str],
        weights: Sequence[float],
        combination_type: str,
        svd_rank: int | None,
    ) -> None:
        for adapter in adapters:
            if adapter not in configs:
                raise ValueError(f"Adapter {adapter} does not exist; the model has {', '.join(configs)}")
            for name, needed in {"use_dora": False, "bias": "none", "trainable_token_indices": None}.items():
                if (value := getattr(configs[adapter], name)) != needed:
                    raise ValueError(
                        f"add_weighted_adapter sums the factors of adapters, and {adapter} has {name}={value!r}, which "
                        "trains more than factors: merge it with merge_and_unload"
                    )
        wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
        shared = [w for w in wrappers if sum(adapter in w.modules_to_save for adapter in set(adapters)) > 1]
        if shared:
            raise ValueError(
                "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
                f"{len(shared)} such instance(s). Give adapters of which at most one has each module"
            )
        if not adapters or len(adapters) != len(weights):
            raise ValueError(
                f"got {len(adapters)} adapters and {len(weights)} weights; needed: one weight for each adapter"
            )
        for weight in weights:
            if not math.isfinite(weight):
                raise ValueError(f"weights must be finite numbers, got {weight!r}")
        if combination_type not in COMBINATIONS:
            raise ValueError(
                f"Invalid combination_type: {combination_type!r}; allowed: {', '.join(COMBINATIONS)}. For sums that "
                "prune, write a model of each adapter with `pissa merge`, and give them to a tool that merges models"
            )
        if svd_rank is not None and svd_rank < 1:
            raise ValueError(f"svd_rank must be a positive integer or None, got {svd_rank!r}")
        layers: dict[str, PissaLayer] = {}
        for adapter in adapters:
            layers |= pissa_layers(model, adapter)
        largest = [max(layer.r.get(adapter, 0) for layer in layers.values()) for adapter in adapters]
        limits = {"cat": sum(largest), "linear": max(largest), "svd": svd_rank or max(largest)}
        self.model, self.configs = model, configs
        self.terms = list(zip(adapters, weights, strict=True))
        self.ranks: dict[str, int] = {}  # by layer of the new adapter
        for name, layer in layers.items():
            sum_of_ranks = sum(layer.r.get(adapter, 0) for adapter in adapters)
            self.ranks[name] = min(limits[combination_type], sum_of_ranks, *layer.matrix_shape)

    def config(self) -> PissaConfig:
        """The new adapter's configuration: the first adapter's, except for fields that the combination determines."""
        ((r, _),) = Counter(self.ranks.values()).most_common(1)
        saved = [name for adapter, _ in self.terms for name in self.configs[adapter].modules_to_save or ()]
        fields: dict[str, Any] = {
            "r": r,
            "lora_alpha": None,  # the rank
            "rank_pattern": {exactly(name): rank for name, rank in self.ranks.items() if rank != r},
            "alpha_pattern": {},
            "use_rslora": False,
            "target_modules": set(self.ranks),
            "modules_to_save": list(dict.fromkeys(saved)) or None,
            "init": "given",
            **dict.fromkeys(["exclude_modules", "layers_to_transform", "layers_pattern"]),
            **dict.fromkeys(["quant", "residual", "repair"]),  # the base stays what it is
            "quant_iters": 1,
        }
        config = dataclasses.replace(self.configs[self.terms[0][0]], **fields)
        # PEFT also treats a name as a target if it ends with one of these.
        targets = {name for name, _ in self.model.named_modules() if check_target_module_exists(config, name)}
        config.exclude_modules = targets.difference(self.ranks) or None
        return config

    @torch.no_grad()
    def start(self, adapter_name: str, config: PissaConfig) -> None:
        """Gives the new adapter its factors. All processes get those of rank 0; each may round an SVD differently."""
        layers = pissa_layers(self.model, adapter_name)
        parts = {name: self._parts(layer, self.ranks[name]) for name, layer in layers.items()}
        distributed.agree()  # from here to the last broadcast, no rank can fail by itself
        for name, layer in layers.items():
            a0, b0, da, db = (distributed.broadcast(part, 0) for part in parts.pop(name))
            layer.share_start(adapter_name, StartFactors(a0, b0, layer.origin(adapter_name, config)))
            deltas = layer.deltas(adapter_name)
            deltas.a.copy_(da)
            deltas.b.copy_(db)
        for wrapper in self.model.modules():
            if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
                owner = next(adapter for adapter, _ in self.terms if adapter in wrapper.modules_to_save)
                wrapper.modules_to_save[adapter_name].load_state_dict(wrapper.modules_to_save[owner].state_dict())

    def _parts(self, layer: PissaLayer, rank: int) -> Parts:
        terms = [(adapter, weight) for adapter, weight in self.terms if adapter in layer.r]
        starts = [layer.start_of(adapter) for adapter, _ in terms]
        changes = [layer.deltas(adapter) for adapter, _ in terms]
        scales = [weight * layer.scaling[adapter] for adapter, weight in terms]
        # s (B A - B0 A0), with s in the right-hand factors, concatenated.
        a0 = torch.cat([scale * start.a0 for scale, start in zip(scales, starts, strict=True)])
        da = torch.cat([scale * change.float() for scale, (change, _) in zip(scales, changes, strict=True)])
        b0 = torch.cat([start.b0 for start in starts], dim=1)
        db = torch.cat([change.float() for _, change in changes], dim=1)
        if len(a0) == rank:
            return a0, b0, da, db
        right = torch.cat([a0.double() + da.double(), da.double()])
        return _split(Spectrum.of(right, torch.cat([db, b0], dim=1).double()), rank)


def _split(spectrum: Spectrum, rank: int) -> Parts:
    """The leading 2 rank components of a change, as dB A + B0 dA. The rows of A and the columns of B0 have length 1, so
    that both deltas can learn even where the change is zero."""
    left, values, right = spectrum.left[:, : 2 * rank], spectrum.values[: 2 * rank], spectrum.right[: 2 * rank]
    values = nn.functional.pad(values, (0, 2 * rank - len(values)))
    right, left = pad_rank(right, left, 2 * rank)
    db, da = left[:, :rank] * values[:rank], values[rank:, None] * right[rank:]
    a0, b0 = right[:rank] - da, left[:, rank:]
    return a0.float().contiguous(), b0.float().contiguous(), da.float().contiguous(), db.float().contiguous()
