"""Where adapters of other tools started: the factors A0, B0 that they took out of a base W, and trained on W - s B0 A0.
They are in the initial adapter, if it was saved, or are computed from the base as PEFT does, a layer at a time."""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pissa.base.kinds import base_of
from pissa.base.protocol import Base
from pissa.base.weights import with_weight
from pissa.files.hub import Name, checkpoint_folder
from pissa.files.lora_folder import LoraFolder
from pissa.files.messages import first_line
from pissa.files.model_folder import ModelFolder, class_of, model_config
from pissa.files.peft_layout import Matrices
from pissa.notices import PissaWarning, UncertainStartWarning, WholeModelWarning
from pissa.ops.checks import FLOATS
from pissa.ops.low_rank import Spectrum, join_difference

GivenBase = nn.Module | Name | None
"""The unmodified base, as users give it: a model in memory, its folder or its name."""

# A larger error of a computed start, as a part of ‖B A - B0 A0‖, is mentioned.
_DOUBT = 0.01


class BaseModel:
    """The base of an adapter: a model in memory, or one in a folder, of which a layer at a time is read.

    One in a folder is loaded as a whole, with a warning, if the weights of the adapter's layers cannot be read one by
    one.

    Args:
        what: what messages call it.

    Raises:
        ValueError: it cannot be loaded, is a model with an adapter, or lacks a layer.
    """

    def __init__(self, base: nn.Module | Name, adapter: LoraFolder, what: str = "base") -> None:
        self.model: nn.Module
        """Without values if it is in a folder."""
        self._folder: ModelFolder | None = None
        self._adapter, self._what = adapter, what
        if isinstance(base, nn.Module):
            self.model = load_base(base)
        else:
            try:
                folder = ModelFolder(checkpoint_folder(base))
                uses = Counter(id(parameter) for _, parameter in folder.model.named_parameters(remove_duplicate=False))
                for name, module in folder.model.named_modules():
                    if name in adapter.factors and uses[id(getattr(module, "weight", None))] == 1:
                        folder.check(name)
                self.model, self._folder = folder.model, folder
            except ValueError as reason:
                self.model = load_base(base)
                warnings.warn(
                    f"{base} is loaded as a whole, into memory, because its weights cannot be read one by one: "
                    f"{reason}",
                    WholeModelWarning,
                    stacklevel=5,
                )
        self.bases = {target: self._checked(target, self._layer(target)) for target in adapter.factors}
        """By target; without values if it is in a folder."""

    @contextmanager
    def matrix(self, target: str) -> Iterator[Tensor]:
        """The weight [out, in] of a layer."""
        if self._folder is None:
            yield self.bases[target].matrix()
            return
        yield self._checked(target, with_weight(self._layer(target), self._folder.weight(target))).matrix()
        self._folder.release(target)

    def _layer(self, target: str) -> nn.Module:
        try:
            return self.model.get_submodule(target)
        except AttributeError:
            raise ValueError(
                f"{self._adapter.weights.path}: the {self._what} has no layer {target}; is it the one that the adapter "
                "was trained on?"
            ) from None

    def _checked(self, target: str, layer: nn.Module) -> Base:
        base, factors = base_of(layer), self._adapter.factors[target]
        if base.kind not in (nn.Linear, Conv1D, nn.Embedding):
            raise ValueError(f"layer {target} is a {type(layer).__name__}, which PEFT starts no PiSSA adapter in")
        weight, shape = base.parameter, (factors.out, math.prod(factors.row))
        if weight.dtype not in FLOATS or tuple(base.matrix().shape) != shape:
            raise ValueError(
                f"layer {target} is {weight.dtype} {list(weight.shape)} in the {self._what}; needed: a float weight, "
                f"{list(shape)} as a matrix, from which the adapter comes"
            )
        return base


def load_base(base: nn.Module | Name) -> nn.Module:
    """The model of a folder or a name, in the dtype of its files, on the CPU. A model is returned as it is.

    Raises:
        ValueError: it cannot be loaded, or is a model with an adapter.
    """
    if isinstance(base, PeftModel):
        raise ValueError("base is a PeftModel, in which PiSSA has replaced weights; needed: the unmodified model")
    if isinstance(base, nn.Module):
        return base
    try:
        return cast(nn.Module, class_of(model_config(base)).from_pretrained(base, dtype="auto"))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{base} cannot be loaded as a model: {first_line(error)}; load it yourself and give the model"
        ) from error


def check_start(trained: LoraFolder, initial: LoraFolder) -> None:
    """Checks that a trained adapter can have started from the initial one.

    Raises:
        ValueError: they have other layers, ranks or scalings, naming the first.
    """
    paths = f"{initial.weights.path} is not where {trained.weights.path} started from"
    for target in [*trained.factors, *initial.factors]:
        if target not in trained.factors or target not in initial.factors:
            where = "trained" if target in trained.factors else "initial"
            raise ValueError(f"{paths}: only the {where} adapter has layer {target}")
        ours, theirs = trained.factors[target], initial.factors[target]
        if ours != theirs:
            shapes, initial_shapes = (list(found.shapes(found.rank).values()) for found in (ours, theirs))
            raise ValueError(
                f"{paths}: layer {target} has factors {initial_shapes} and scaling {theirs.scaling:g} there, {shapes} "
                f"and {ours.scaling:g} here"
            )


class ComputedStart:
    """A0 and B0 as PEFT's exact "pissa" computes them from the weights of a base, in float32, and subtracts them.

    PEFT then rounds them to the base's dtype; that difference is in dA and dB. Embeddings are left out: PEFT starts
    them as a plain LoRA, and leaves their weight as it is.

    Raises:
        ValueError: it cannot be computed, or the base lacks a layer; later, by `starts`, the trained factors did not
            start from a weight of it.
    """

    def __init__(self, trained: LoraFolder, base: GivenBase) -> None:
        init = trained.config["init_lora_weights"]
        if init != "pissa":
            raise ValueError(
                f"{trained.config_path}: init_lora_weights is {init!r}, a random decomposition that PEFT does not "
                "seed, so its start cannot be computed again. Give the adapter as it was saved before training "
                "(initial). Without it the adapter can only be used with the residual model that it was trained on"
            )
        if base is None:
            raise ValueError(
                f"{trained.config_path}: init_lora_weights is 'pissa'; the adapter belongs to W - s B0 A0. Give the "
                "base W (base), or the adapter as it was saved before training (initial)"
            )
        if trained.config.get("layer_replication"):
            raise ValueError(
                f"{trained.config_path}: layer_replication gives layers other numbers than the base's; give the "
                "initial adapter (initial)"
            )
        self._trained, self._base = trained, BaseModel(base, trained)
        bases = self._base.bases.items()
        adapted = {id(base.parameter): target for target, base in bases if base.kind is not nn.Embedding}
        for name, parameter in self._base.model.named_parameters(remove_duplicate=False):
            target = adapted.get(id(parameter))
            if target is not None and name != f"{target}.weight":
                raise ValueError(
                    f"layer {target} shares its weight with {name}: PEFT put the residual in both, so the model that "
                    "was trained is no LoRA on the base"
                )
        self._doubts: dict[str, float] = {}

    def starts(self, target: str) -> list[Matrices]:
        """A0 [r, in] and B0 [out, r] of a layer, float32's values in float64; none of an embedding."""
        if self._base.bases[target].kind is nn.Embedding:
            return []
        with self._base.matrix(target) as weight:
            start, doubt = _aligned_start(self._trained, target, weight)
        if doubt > _DOUBT:
            self._doubts[target] = doubt
        return [start]

    def doubts(self) -> list[PissaWarning]:
        """What is to be known of the starts, once all have been asked for."""
        if not self._doubts:
            return []
        worst = max(self._doubts, key=lambda target: self._doubts[target])
        text = (
            f"{self._trained.weights.path}: in {len(self._doubts)} layers the singular values at the adapter's rank "
            f"and behind it are so close that another machine's rounding moves the start by more than {_DOUBT:.0%} of "
            f"what was learnt, by about {self._doubts[worst]:.0%} in {worst}. If the adapter was not trained on this "
            "machine, with this torch, give the initial adapter (initial), with which the conversion is exact"
        )
        return [UncertainStartWarning(text)]


def _aligned_start(adapter: LoraFolder, target: str, weight: Tensor) -> tuple[Matrices, float]:
    """A0 and B0, and how much B0 A0 may differ on another machine, as a part of B A - B0 A0."""
    rank, scaling = adapter.factors[target].rank, adapter.factors[target].scaling
    a, b = adapter.matrices(target)[0]
    u, s, vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)  # as peft.tuners.lora does
    root = torch.diag((s[:rank] / scaling).sqrt())
    a0, b0 = (root @ vh[:rank]).cpu(), (u[:, :rank] @ root).cpu()
    # The sign of a pair of singular vectors is the machine's choice; that of the product is not.
    signs = torch.where((a * a0).sum(1) + (b * b0).sum(0) < 0, -1.0, 1.0)
    a0, b0 = signs[:, None] * a0, b0 * signs
    moved = (a - a0).square().sum() + (b - b0).square().sum()
    if not moved < a0.square().sum() + b0.square().sum():
        raise ValueError(
            f"{adapter.weights.path}: the factors of layer {target} are farther from their start in this base than "
            "zero is: it is not the base that the adapter was trained on. If it is, give the initial adapter (initial)"
        )
    a0, b0 = a0.double(), b0.double()
    learnt = float(Spectrum.of(*join_difference(a, a - a0, b - b0, b0)).energy[0]) ** 0.5
    if rank == len(s) or not learnt:
        return (a0, b0), 0.0
    # Rounding by some units, 2^-22 s_1 in all, turns the last vectors that count by that over the gap behind them.
    first, last, behind = (float(s[i]) / scaling for i in (0, rank - 1, rank))
    error = 2.0**-22 * first * last / max(last - behind, sys.float_info.epsilon * last)
    return (a0, b0), min(error / learnt, 1.0)


def check_sum(initial: LoraFolder, residual: Path, base: nn.Module | Name) -> None:
    """Compares W_res + s B0 A0 with W, element by element, a layer at a time.

    They may differ by the rounding of W_res, A0 and B0 to the residual's dtype, in which PEFT keeps all three, and by
    that of the float32 product of r terms that was subtracted.

    Raises:
        ValueError: naming the first layer that differs by more.
    """
    of_residual, of_base = BaseModel(residual, initial, "residual model"), BaseModel(base, initial)
    for target, factors in initial.factors.items():
        with of_residual.matrix(target) as residual_weight, of_base.matrix(target) as base_weight:
            kept, weight = residual_weight.detach().cpu(), base_weight.detach().cpu().double()
            [(a0, b0)] = initial.matrices(target)
            product = factors.scaling * (b0 @ a0)
            size = abs(factors.scaling) * (b0.abs() @ a0.abs())
            unit = torch.finfo(kept.dtype).eps / 2
            # If W had a wider type than W_res, both come from one rounding of the same number.
            bound = unit * (kept.double().abs() + weight.abs())
            bound += ((factors.rank + 4) * 2.0**-24 + 2 * unit) * (size + weight.abs())
            error = (kept.double() + product - weight).abs()
        if (worst := (error / bound.clamp(min=torch.finfo(torch.float64).tiny)).max()) > 1:
            raise ValueError(
                f"the residual model and {initial.weights.path} do not add up to the base: in layer {target} they "
                f"differ by {error.max():.3g}, {worst:.3g} times what rounding explains"
            )
