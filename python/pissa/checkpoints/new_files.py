"""The files of a checkpoint that holds residuals: what is in each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from pissa.base.start import StartFactors
from pissa.checkpoints.layer import new_shards
from pissa.checkpoints.plan import Plan, PlannedLayer
from pissa.config import PissaConfig
from pissa.conversion.lora_start import INITIAL_FOLDER
from pissa.files.peft_layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pissa.files.pissa_layout import PISSA_WEIGHTS, TAKEN
from pissa.files.safetensors_header import Layout

INITIAL_WEIGHTS = f"{INITIAL_FOLDER}/{ADAPTER_WEIGHTS}"
INITIAL_CONFIG = f"{INITIAL_FOLDER}/{ADAPTER_CONFIG}"


def layouts(plan: Plan) -> dict[str, Layout]:
    """All safetensors files."""
    found = new_shards(plan.source, [layer for layer in plan.layers.values() if layer.is_packed])
    found[INITIAL_WEIGHTS] = _float32(
        {
            name: shape
            for tensors in plan.factors
            for name, shape in tensors.shapes(plan.layers[tensors.layers[0]].origin.r).items()
        }
    )
    alternated = [layer for layer in plan.layers.values() if has_taken(plan.config_of(layer))]
    if alternated:
        found[PISSA_WEIGHTS] = _float32({k: shape for layer in alternated for k, shape in _taken_shapes(layer).items()})
    return found


def _float32(shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    return Layout({name: (torch.float32, shape) for name, shape in shapes.items()}, {"format": "pt"})


def has_taken(config: PissaConfig) -> bool:
    """Whether residuals may lack other factors than those of the start."""
    return config.quant_iters > 1


def _taken_shapes(layer: PlannedLayer) -> dict[str, tuple[int, int]]:
    (rows, columns), r = layer.shape, layer.origin.r
    return {f"{layer.name}.{TAKEN[0]}": (r, columns), f"{layer.name}.{TAKEN[1]}": (rows, r)}


def taken_tensors(layer: PlannedLayer, start: StartFactors) -> dict[str, Tensor]:
    """The factors that are taken out of the weight, with the rank of the start: zeros fill them up."""
    a, b = start.taken
    missing = layer.origin.r - len(a)
    pair = functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing))
    return dict(zip(_taken_shapes(layer), pair, strict=True))


def start_tensors(start: StartFactors) -> list[Tensor]:
    """The tensors of a start of which the record has the fingerprint: the factors, and those taken, if they are
    others."""
    return [start.a0, start.b0, *(start.taken if start.rank_taken else ())]
