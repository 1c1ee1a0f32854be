"""The start factors A0, B0 of adapters that other tools trained on a residual W - s B0 A0 of the base. They come from
the initial adapter, if it was saved, or are computed from the base as PEFT does."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pissa.base.kinds import base_of
from pissa.base.protocol import Base
from pissa.conversion.base_model import BaseModel
from pissa.conversion.delta_weight import DeltaWeight
from pissa.files.lora_folder import LoraFolder
from pissa.files.peft_layout import ADAPTER_CONFIG, Matrices
from pissa.ops.checks import FLOATS
from pissa.ops.low_rank import Spectrum

INITIAL_FOLDER = "pissa_init"
"""The sub-folder of a residual model in which the paper's authors keep the adapter before training."""


class Starts:
    """The start factors of each target, read or computed when they are asked for. This class is that of an adapter
    which has none to be compared with."""

    def of(self, target: str) -> list[Matrices] | None:
        """A0 [r, in] and B0 [out, r], float32 or float64, of a layer, or of each expert; None if B0 A0 is zero."""
        return None

    def doubt(self) -> str | None:
        """A warning, once all have been asked for."""
        return None


def initial_folder(given: str | os.PathLike[str]) -> tuple[Path, Path | None]:
    """The folder of an initial adapter, and that of the residual model in which it lies, if it lies in one.

    Args:
        given: either of the two.
    """
    folder = Path(given)
    if (folder / INITIAL_FOLDER / ADAPTER_CONFIG).is_file() and not (folder / ADAPTER_CONFIG).is_file():
        folder = folder / INITIAL_FOLDER
    residual = folder.resolve().parent
    return folder, residual if folder.name == INITIAL_FOLDER and (residual / "config.json").is_file() else None


def residual_of(adapter: LoraFolder) -> Path | None:
    """The residual model that the adapter says it was trained on, if that is a folder with the initial adapter."""
    name = adapter.config["base_model_name_or_path"]
    return Path(name) if name and (Path(name) / INITIAL_FOLDER / ADAPTER_CONFIG).is_file() else None


def start_from_initial(source: LoraFolder, initial: LoraFolder) -> Starts:
    """The factors of the initial adapter.

    Raises:
        ValueError: it has other layers, ranks or scalings than the trained one, naming the first.
    """
    paths = f"{initial.weights.path} is not where {source.weights.path} started from"
    for target in [*source.factors, *initial.factors]:
        if target not in source.factors or target not in initial.factors:
            where = "trained" if target in source.factors else "initial"
            raise ValueError(f"{paths}: only the {where} adapter has layer {target}")
        ours, theirs = source.factors[target], initial.factors[target]
        shapes, initial_shapes = (list(found.shapes(found.rank).values()) for found in (ours, theirs))
        if shapes != initial_shapes or ours.scaling != theirs.scaling:
            raise ValueError(
                f"{paths}: layer {target} has factors {initial_shapes} and scaling {theirs.scaling:g} there, {shapes} "
                f"and {ours.scaling:g} here"
            )
    return InitialStarts(initial)


class InitialStarts(Starts):
    """The factors of an initial adapter."""

    def __init__(self, initial: LoraFolder) -> None:
        self._initial = initial

    def of(self, target: str) -> list[Matrices] | None:
        found = self._initial.matrices(target)
        return found if any(a0.any() and b0.any() for a0, b0 in found) else None


class BaseStarts(Starts):
    """A0 and B0 as PEFT's exact "pissa" computes them from the weights of `base`, in float32, and subtracts them.

    PEFT then rounds them to the base's dtype; that difference is in dA and dB. Embeddings are left out: PEFT starts
    them as a plain LoRA, and leaves their weight as it is.

    Raises:
        ValueError: `base` lacks a layer; later, in `of`, the trained factors did not start from a weight of it.
    """

    def __init__(self, source: LoraFolder, base: BaseModel) -> None:
        if source.config.get("layer_replication"):
            raise ValueError(
                f"{source.config_path}: layer_replication gives layers other numbers than the base's; give the initial "
                "adapter (initial)"
            )
        self._source, self._base = source, base
        bases = {target: _base(source, target, base.model) for target in source.factors}
        self._embeddings = {target for target, found in bases.items() if found.kind is nn.Embedding}
        _check_untied(base.model, bases)
        self._doubts: dict[str, float] = {}

    def of(self, target: str) -> list[Matrices] | None:
        if target in self._embeddings:
            return None
        with self._base.layer(target) as layer:
            start, doubt = _aligned_start(self._source, target, _checked(self._source, target, layer).matrix())
        if doubt > _DOUBT:
            self._doubts[target] = doubt
        return [start]

    def doubt(self) -> str | None:
        if not self._doubts:
            return None
        worst = max(self._doubts, key=lambda target: self._doubts[target])
        return (
            f"{self._source.weights.path}: in {len(self._doubts)} layers the singular values at the adapter's rank and "
            f"behind it are so close that another machine's rounding moves the start by more than {_DOUBT:.0%} of what "
            f"was learnt, by about {self._doubts[worst]:.0%} in {worst}. If the adapter was not trained on this "
            "machine, with this torch, give the initial adapter (initial), with which the conversion is exact"
        )


# A larger error of the start, as a part of ‖B A - B0 A0‖, is mentioned.
_DOUBT = 0.01


def _base(source: LoraFolder, target: str, model: nn.Module, what: str = "base") -> Base:
    """The base that a layer of the model is, with or without values."""
    try:
        return _checked(source, target, model.get_submodule(target), what)
    except AttributeError:
        raise ValueError(
            f"{source.weights.path}: the {what} has no layer {target}; is it the one that the adapter was trained on?"
        ) from None


def _checked(source: LoraFolder, target: str, layer: nn.Module, what: str = "base") -> Base:
    base, factors = base_of(layer), source.factors[target]
    if base.kind not in (nn.Linear, Conv1D, nn.Embedding):
        raise ValueError(f"layer {target} is a {type(layer).__name__}, which PEFT starts no PiSSA adapter in")
    weight, shape = base.parameter, (factors.out, math.prod(factors.row))
    if weight.dtype not in FLOATS or tuple(base.matrix().shape) != shape:
        raise ValueError(
            f"layer {target} is {weight.dtype} {list(weight.shape)} in the {what}; needed: a float weight, "
            f"{list(shape)} as a matrix, from which the adapter comes"
        )
    return base


def _check_untied(model: nn.Module, bases: Mapping[str, Base]) -> None:
    adapted = {id(base.parameter): target for target, base in bases.items() if base.kind is not nn.Embedding}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        target = adapted.get(id(parameter))
        if target is not None and name != f"{target}.weight":
            raise ValueError(
                f"layer {target} shares its weight with {name}: PEFT put the residual in both, so the model that was "
                "trained is no LoRA on the base"
            )


def _aligned_start(source: LoraFolder, target: str, weight: Tensor) -> tuple[Matrices, float]:
    """A0 and B0, and how much B0 A0 may differ on another machine, as a part of B A - B0 A0."""
    rank, scaling = source.factors[target].rank, source.factors[target].scaling
    a, b = source.matrices(target)[0]
    u, s, vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)  # as peft.tuners.lora does
    root = torch.diag((s[:rank] / scaling).sqrt())
    a0, b0 = (root @ vh[:rank]).cpu(), (u[:, :rank] @ root).cpu()
    # The sign of a pair of singular vectors is the machine's choice; that of the product is not.
    signs = torch.where((a * a0).sum(1) + (b * b0).sum(0) < 0, -1.0, 1.0)
    a0, b0 = signs[:, None] * a0, b0 * signs
    moved = (a - a0).square().sum() + (b - b0).square().sum()
    if not moved < a0.square().sum() + b0.square().sum():
        raise ValueError(
            f"{source.weights.path}: the factors of layer {target} are farther from their start in this base than zero "
            "is: it is not the base that the adapter was trained on. If it is, give the initial adapter (initial)"
        )
    learnt = float(Spectrum.of(*DeltaWeight(1.0, a, b, (a0.double(), b0.double())).factors()).energy[0]) ** 0.5
    if rank == len(s) or not learnt:
        return (a0, b0), 0.0
    # Rounding by some units, 2^-22 s_1 in all, turns the last vectors that count by that over the gap behind them.
    first, last, behind = (float(s[i]) / scaling for i in (0, rank - 1, rank))
    error = 2.0**-22 * first * last / max(last - behind, sys.float_info.epsilon * last)
    return (a0, b0), min(error / learnt, 1.0)


def check_sum(initial: LoraFolder, starts: Starts, residual: BaseModel, base: BaseModel) -> None:
    """Compares W_res + s B0 A0 with W, element by element, a layer at a time.

    They may differ by the rounding of W_res, A0 and B0 to the residual's dtype, in which PEFT keeps all three, and by
    that of the float32 product of r terms that was subtracted.

    Raises:
        ValueError: naming the first layer that differs by more.
    """
    for model, what in ((residual, "residual model"), (base, "base")):
        for target in initial.factors:
            _base(initial, target, model.model, what)
    for target in initial.factors:
        if (start := starts.of(target)) is None:
            continue
        with residual.layer(target) as of_residual, base.layer(target) as of_base:
            kept, weight = (
                _checked(initial, target, layer, what).matrix().detach().cpu()
                for layer, what in ((of_residual, "residual model"), (of_base, "base"))
            )
            _check_sum(initial, target, start[0], kept, weight)


def _check_sum(initial: LoraFolder, target: str, start: Matrices, kept: Tensor, weight: Tensor) -> None:
    (a0, b0), rank, scaling = start, initial.factors[target].rank, initial.factors[target].scaling
    product = scaling * (b0.double() @ a0.double())
    size = abs(scaling) * (b0.double().abs() @ a0.double().abs())
    unit = torch.finfo(kept.dtype).eps / 2
    # If W had a wider type than W_res, both come from one rounding of the same number.
    bound = unit * (kept.double().abs() + weight.double().abs()) + ((rank + 4) * 2.0**-24 + 2 * unit) * (
        size + weight.double().abs()
    )
    error = (kept.double() + product - weight.double()).abs()
    if (worst := (error / bound.clamp(min=torch.finfo(torch.float64).tiny)).max()) > 1:
        raise ValueError(
            f"the residual model and {initial.weights.path} do not add up to the base: in layer {target} they "
            f"differ by {error.max():.3g}, {worst:.3g} times what rounding explains"
        )
