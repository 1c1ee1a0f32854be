"""The trained weights of an adapter: for each layer, the base function of the training and the change."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from pissa import ops
from pissa.adapters.lora_folder import LoraFolder, open_adapter
from pissa.adapters.peft_layout import Matrices, magnitude_key
from pissa.adapters.pissa_layout import PissaFolder
from pissa.adapters.restore import base_doubts
from pissa.base.digest import Match, dtype_of, is_fingerprint, match
from pissa.base.start import StartFactors
from pissa.base.stored import residual_tensors, residuals_of, stored_linear
from pissa.checkpoints.rewrite import LayerPlan, Layers
from pissa.config import IMPLICIT
from pissa.containers.checkpoint import Checkpoint, initial_adapter
from pissa.containers.coded_weights import BitsandbytesWeight
from pissa.conversion.plain_lora import ON_RESIDUAL, OURS, PlainLora, check_start
from pissa.layers.layer import Magnitude
from pissa.notices import PissaWarning
from pissa.ops import QuantizedWeight

Weight = Tensor | QuantizedWeight
"""The matrix [out, in] of a layer, as it is in the checkpoint."""

BaseFunction = tuple[Tensor, Callable[[Tensor], Tensor]]
"""The weight of a base in float32, which the caller owns, and x Wᵀ."""


class TrainedWeights:
    """An adapter in a folder, for the layers of a checkpoint."""

    def __init__(self, lora: PlainLora, source: Checkpoint) -> None:
        self.lora, self.folder, self.source = lora, lora.folder, source
        self.what = lora.what
        """The kind of the adapter, in words."""

    @property
    def is_on_weights(self) -> bool:
        """Whether the change is low-rank on the checkpoint's own weights."""
        return self.what != ON_RESIDUAL

    def check_base(self, layer: LayerPlan, weight: Weight) -> None:
        """Raises ValueError if a layer's weight is known to be another one than that of the training."""

    def factors(self, unit: Layers) -> Iterator[Matrices]:
        """Yields factors a [k, in] and b [out, k] of the change of each layer of a unit, float32."""
        for layer, (a, b) in zip(unit.layers, self.lora.matrices(unit.name), strict=True):
            yield (b.mT.float(), a.mT.float()) if layer.mirrored else (a.float(), b.float())

    def scaling(self, layer: LayerPlan, target: str) -> float:
        """The factor by which their product is multiplied."""
        return self.folder.factors[target].scaling

    def base(self, layer: LayerPlan, weight: Weight) -> BaseFunction:
        """The base function."""
        return _dense(weight)

    def lengths(self, layer: LayerPlan, weight: Tensor) -> Tensor:
        """With DoRA, the lengths of the base's rows."""
        lengths: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
        return lengths

    def doubts(self) -> list[PissaWarning]:
        """Warnings about the weights, after all of them have been read."""
        return []

    def states(self) -> dict[str, str]:
        """The state of its files, for the identity of a run."""
        states = {}
        for what, folder in {"adapter": self.folder, "initial": self.lora.initial}.items():
            for path in [] if folder is None else sorted(folder.path.iterdir()):
                if path.suffix in (".json", ".safetensors"):
                    states[f"{what} {path.name}"] = f"{path.stat().st_size} bytes, {path.stat().st_mtime_ns} ns"
        return states

    def read_trained(self, unit: Layers) -> Iterator[tuple[LayerPlan, Tensor, float]]:
        """Yields the layers of a unit, one at a time, each with its trained weight, float32 [out, in], which the caller
        owns, and ‖change‖². Without gradients."""
        factors = itertools.repeat(None) if unit.factors is None else self.factors(unit)
        for layer, pair in zip(unit.layers, factors, strict=False):
            weight = read_weight(layer, self.source)
            if pair is None:
                yield layer, _dense(weight)[0], 0.0
                continue
            target, (a, b) = unit.name, pair
            if layer.own_key is not None:
                own = self.lora.own_weight(target, self.lora.starts(target)).to(layer.dtype)
                weight = own.mT if layer.transposed else own.flatten(1)
            yield layer, *self._add_change(layer, target, weight, a.contiguous(), b.contiguous())

    def _add_change(self, layer: LayerPlan, target: str, weight: Weight, a: Tensor, b: Tensor) -> tuple[Tensor, float]:
        (base, product), scaling = self.base(layer, weight), self.scaling(layer, target)
        delta = (b @ a).mul_(scaling)  # as PissaLayer.delta_matrix rounds it
        if self.folder.config["use_dora"]:
            key = magnitude_key(layer.name)
            key = key if key in self.folder.weights.entries else f"{key}.weight"
            lengths = self.folder.weights.read(key).float()
            magnitude = Magnitude(lengths)
            magnitude.set(lengths, self.lengths(layer, base))
            scale = magnitude.scale(b, a, product(a), scaling)
            delta = scale[:, None] * (base + delta) - base
        change = float(torch.linalg.vector_norm(delta)) ** 2
        return base.add_(delta), change


class Ours(TrainedWeights):
    """An adapter of pissa, with the base function on which it was trained. A stored residual is computed again, or is
    the checkpoint's own if that contains residuals of these layers."""

    def __init__(self, folder: LoraFolder, ours: PissaFolder, source: Checkpoint, residuals: Collection[str]) -> None:
        super().__init__(PlainLora(folder, OURS), source)
        self.ours, path = ours, ours.path
        self._residuals = residuals
        self._narrower: dict[str, tuple[torch.dtype, torch.dtype]] = {}
        self._other_bits: list[str] = []
        for name in residuals:
            if name not in ours.layers:
                raise ValueError(
                    f"{path} does not adapt layer {name}, of which {source.folder} has a residual: it was not trained "
                    "on it; give the base that it was trained on [P092]"
                )
            if self.ours.layers[name].form == IMPLICIT:
                raise ValueError(
                    f"{path} was trained on the unmodified base, and {source.folder} has a residual of layer {name}: "
                    "give the unmodified base [P092]"
                )

    @property
    def is_on_weights(self) -> bool:
        return all(record.form == IMPLICIT for record in self.ours.layers.values())

    def check_base(self, layer: LayerPlan, weight: Weight) -> None:
        self._cast_as_trained(layer, weight)

    def scaling(self, layer: LayerPlan, target: str) -> float:
        return self.ours.layers[layer.name].scaling

    def lengths(self, layer: LayerPlan, weight: Tensor) -> Tensor:
        return self.ours.read_lengths(layer.name)[1]

    def factors(self, unit: Layers) -> Iterator[Matrices]:
        for layer in unit.layers:
            yield self.ours.read_starts(layer.name).own.factors_of_change(self.ours.read_deltas(layer.name))

    def factors_on_residual(self, name: str) -> Matrices:
        """The factors of a plain LoRA on the residual of a layer."""
        return self.ours.read_starts(name).factors_on("residual", self.ours.read_deltas(name))

    def base(self, layer: LayerPlan, weight: Weight) -> BaseFunction:
        record = self.ours.layers[layer.name]
        if record.form == IMPLICIT:
            return _dense(self._cast_as_trained(layer, weight))
        residual = self.residual(layer, weight)
        stored = stored_linear(residual, self._base_start(layer.name))
        return stored.matrix(), stored.product

    def residual(self, layer: LayerPlan, weight: Weight) -> Weight:
        """The residual on which a layer with a stored base was trained, computed from `weight`, its matrix in the
        checkpoint."""
        name, record = layer.name, self.ours.layers[layer.name]
        if name in self._residuals:
            if not is_fingerprint(record.stored, *residual_tensors(weight).values()):
                raise ValueError(self._other_base(layer, "residual"))
            return weight
        saved = self.ours.read_stored(name, layer.shape, torch.device("cpu"))
        if saved is not None:
            return saved
        known = self._cast_as_trained(layer, weight)
        dense = ops.dequantize(known) if isinstance(known, QuantizedWeight) else known
        [residual] = residuals_of([dense], [self._base_start(name)], record.form, [name])
        if not is_fingerprint(record.stored, *residual_tensors(residual).values()):
            self._other_bits.append(name)
        return residual

    def _base_start(self, name: str) -> StartFactors:
        """The start that the stored base of a layer lacks."""
        base = self.ours.read_starts(name).base
        assert base is not None, name
        return base

    def _cast_as_trained(self, layer: LayerPlan, weight: Weight) -> Weight:
        """The weight as in the training: codes unchanged, and a dense weight in the dtype that the record names."""
        recorded = self.ours.layers[layer.name].weight
        dense = ops.dequantize(weight) if isinstance(weight, QuantizedWeight) else weight
        comparison = match(recorded, dense)
        if comparison is Match.OTHER:
            raise ValueError(self._other_base(layer, "weight"))
        if comparison is Match.ROUNDED:
            self._narrower[layer.name] = dense.dtype, dtype_of(recorded)
        return weight if isinstance(weight, QuantizedWeight) else weight.to(dtype_of(recorded))

    def doubts(self) -> list[PissaWarning]:
        return base_doubts(self.ours.path, self._narrower, self._other_bits)

    def _other_base(self, layer: LayerPlan, what: str) -> str:
        return (
            f"{self.source.folder} is not the base that {self.ours.path} was trained on: the {what} of layer "
            f"{layer.name} has other values. Give the same checkpoint; to merge into another base all the same, "
            f"convert the adapter to a plain LoRA first [P092]"
        )


def read_adapter(folder: LoraFolder, source: Checkpoint) -> TrainedWeights:
    """Reads the adapter in a folder, for a checkpoint that is the base, or a residual that lacks its start.

    Raises:
        ValueError: the adapter cannot be read, or does not belong to the checkpoint.
    """
    start_folder = initial_adapter(source.folder)
    at_start = None if start_folder is None else open_adapter(start_folder)
    if folder.ours is not None:
        layers = () if at_start is None else [name for part in at_start.factors.values() for name in part.layers]
        return Ours(folder, folder.ours, source, layers)
    if at_start is not None:
        if not folder.leaves_base:
            raise ValueError(
                f"{folder.config_path}: init_lora_weights is {folder.config['init_lora_weights']!r}, which changes the "
                f"base, and {source.folder} is a residual: an adapter on it starts from its pissa_init"
            )
        check_start(folder, at_start)
        return TrainedWeights(PlainLora(folder, ON_RESIDUAL), source)
    return TrainedWeights(PlainLora.of(folder, source.folder), source)


def read_weight(layer: LayerPlan, source: Checkpoint) -> Weight:
    """The matrix of a layer, which is a view of the mapped file if it is one tensor there. Codes of bitsandbytes stay
    codes, on which the adapter was trained."""
    if all(isinstance(source.coded.get(part.tensor), BitsandbytesWeight) for part in layer.parts):
        return source.codes(layer.parts)
    return source.matrix(layer.parts).flatten(1)


def _dense(weight: Weight) -> BaseFunction:
    if isinstance(weight, QuantizedWeight):
        return ops.dequantize(weight), lambda x: ops.linear(x, weight)
    return weight.to(torch.float32, copy=True), lambda x: ops.linear(x, weight)
