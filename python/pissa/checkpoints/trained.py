"""The weights that an adapter was trained to: for each layer the base function of the training, and the change."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pissa import ops
from pissa.base.bitsandbytes import from_state
from pissa.base.digest import Fingerprint, Match, dtype_of, is_fingerprint, match
from pissa.base.init_methods import INIT_METHODS
from pissa.base.start import Origin
from pissa.base.stored import Replaced, residual_tensors, residuals_of, stored_linear
from pissa.checkpoints.plan import Layer, Unit
from pissa.config import IMPLICIT
from pissa.conversion.lora_start import INITIAL_FOLDER, initial_folder, residual_of, start_from_initial
from pissa.conversion.source import OURS, PLAIN_STARTS, check_described, check_unused
from pissa.conversion.source import Source as Foreign
from pissa.files.checkpoint import Checkpoint, LayerTensors
from pissa.files.fit import base_doubts
from pissa.files.lora_folder import LoraFolder
from pissa.files.model_folder import matrix_of
from pissa.files.peft_layout import ADAPTER_CONFIG, Matrices, magnitude_key
from pissa.files.pissa_layout import PISSA_RECORD, read_stored
from pissa.files.source import Source
from pissa.layers.dora import Magnitude
from pissa.notices import PissaWarning, UncertainStartWarning
from pissa.ops import QuantizedWeight

Weight = Tensor | QuantizedWeight
"""The matrix [out, in] of a layer, as the checkpoint has it."""


class Trained(NamedTuple):
    """The weight that a layer was trained to."""

    layer: Layer
    weight: Tensor
    """float32 [out, in]; it is the caller's."""
    change: float
    """‖change‖², Frobenius."""


class Base(NamedTuple):
    """The base function of a layer."""

    weight: Tensor
    """float32 [out, in]; it is the caller's."""
    product: Callable[[Tensor], Tensor]
    """x Wᵀ."""


class Adapter:
    """An adapter in a folder, for the layers of a checkpoint."""

    def __init__(self, folder: LoraFolder, source: Source, what: str) -> None:
        self.folder, self.source = folder, source
        self.what = what
        """What it is, in words."""
        self.folders = {"adapter": folder.config_path.parent}
        """Where its files are, by what is in them."""

    def factors(self, target: str) -> list[Matrices]:
        """Factors a [k, in] and b [out, k] of the change of each layer of a target, float32."""
        return [(a.float(), b.float()) for a, b in self.folder.matrices(target)]

    def scaling(self, layer: Layer, target: str) -> float:
        """The factor of their product."""
        return self.folder.factors[target].scaling

    def base(self, layer: Layer, weight: Weight, factors: Matrices) -> Base:
        """The base function."""
        return _dense(weight)

    def lengths(self, layer: Layer, weight: Tensor) -> Tensor:
        """With DoRA, the lengths of the base's rows."""
        found: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
        return found

    def own_weight(self, layer: Layer, target: str) -> Tensor:
        """The weight that the adapter's file has in the place of the checkpoint's, in the module's shape."""
        assert layer.own_key is not None
        return self.folder.weights.read(layer.own_key)

    def doubts(self) -> list[PissaWarning]:
        """What is to be known of the weights, once all have been asked for."""
        return []

    def trained(self, unit: Unit) -> Iterator[Trained]:
        """The layers of a unit, one at a time; without gradients.

        Raises:
            ValueError: the checkpoint is not the base that the adapter was trained on, naming the layer.
        """
        factors = None if unit.factors is None else self.factors(unit.name)
        for index, layer in enumerate(unit.layers):
            weight = read_weight(layer, self.source)
            if factors is None or unit.factors is None:
                yield Trained(layer, _dense(weight).weight, 0.0)
                continue
            target, (a, b) = unit.name, factors[index]
            if layer.mirrored:
                a, b = b.mT, a.mT
            if layer.own_key is not None:
                own = self.own_weight(layer, target).to(layer.dtype)
                weight = own.mT if layer.transposed else own.flatten(1)
            yield self._trained(layer, target, weight, a.contiguous(), b.contiguous())

    def _trained(self, layer: Layer, target: str, weight: Weight, a: Tensor, b: Tensor) -> Trained:
        base, scaling = self.base(layer, weight, (a, b)), self.scaling(layer, target)
        delta = (b @ a).mul_(scaling)  # as PissaLayer.delta_matrix rounds it
        if self.folder.config["use_dora"]:
            magnitude = self._magnitude(layer, base.weight)
            scale = magnitude.scale(b, a, base.product(a), scaling)
            delta = scale[:, None] * (base.weight + delta) - base.weight
        change = float(torch.linalg.vector_norm(delta)) ** 2
        return Trained(layer, base.weight.add_(delta), change)

    def _magnitude(self, layer: Layer, weight: Tensor) -> Magnitude:
        key = magnitude_key(layer.name)
        key = key if key in self.folder.weights.names else f"{key}.weight"
        lengths = self.folder.weights.read(key).float()
        magnitude = Magnitude(lengths)
        magnitude.set(lengths, self.lengths(layer, weight))
        return magnitude


class Converted(Adapter):
    """An adapter of another tool for the unmodified base, as `pissa.convert` reads it.

    Args:
        initial: what has the adapter before training, if it is read.
    """

    def __init__(self, found: Foreign, source: Source, initial: str | os.PathLike[str] | None) -> None:
        super().__init__(found.folder, source, found.layout)
        self._found = found
        if initial is not None:
            self.folders["initial"], _ = initial_folder(initial)

    def factors(self, target: str) -> list[Matrices]:
        pairs = (delta.factors() for delta in self._found.deltas(target))
        return [(a.float(), b.float()) for a, b in pairs]

    def own_weight(self, layer: Layer, target: str) -> Tensor:
        return self._found.own_weight(target, self._found.deltas(target))

    def doubts(self) -> list[PissaWarning]:
        text = self._found.starts.doubt()
        return [] if text is None else [UncertainStartWarning(text)]


class Ours(Adapter):
    """An adapter of pissa, with the base function that it was trained on: a stored residual is computed once more, or
    is the checkpoint's own.

    Args:
        residuals: the layers of which the checkpoint has residuals.

    Raises:
        ValueError: the files are damaged, or do not belong together, or to this checkpoint.
    """

    def __init__(self, path: Path, folder: LoraFolder, source: Source, residuals: Collection[str]) -> None:
        super().__init__(folder, source, OURS)
        self._checkpoint = Checkpoint.read(path)
        self._checkpoint.starts.expect_checksums()
        self.records = self._checkpoint.records
        """Of the layers, by name."""
        check_described(folder, self.records)
        self.init = self._checkpoint.config.init
        """The name of the method that the adapter starts by."""
        self._residuals = residuals
        self._narrower: dict[str, torch.dtype] = {}
        self._other_bits: list[str] = []
        for name in residuals:
            if name not in self.records:
                raise ValueError(
                    f"{path} does not adapt layer {name}, of which {source.folder} has a residual: it was not trained "
                    "on it; give the base that it was trained on"
                )
            if self.records[name].form == IMPLICIT:
                raise ValueError(
                    f"{path} was trained on the unmodified base, and {source.folder} has a residual of layer {name}: "
                    "give the unmodified base"
                )

    def scaling(self, layer: Layer, target: str) -> float:
        return self.records[layer.name].scaling

    def lengths(self, layer: Layer, weight: Tensor) -> Tensor:
        return self._checkpoint.starts.read(f"{layer.name}.norm")

    def base(self, layer: Layer, weight: Weight, factors: Matrices) -> Base:
        record = self.records[layer.name]
        if record.form == IMPLICIT:
            return _dense(self._as_trained(layer, weight))
        residual = self.residual(layer, weight, factors)
        replaced = Replaced(nn.Linear, layer.dtype, None, Fingerprint(record.weight))
        start = self.tensors(layer.name, factors).base
        stored = stored_linear(replaced, residual, start, torch.uint8)
        return Base(stored.matrix(), stored.product)

    def residual(self, layer: Layer, weight: Weight, factors: Matrices) -> Weight:
        """The residual that a layer was trained on whose base is stored.

        Args:
            weight: the matrix of the layer in the checkpoint.
            factors: the pair of the layer in PEFT's file.

        Raises:
            ValueError: the checkpoint is not the base of the training.
        """
        name, record = layer.name, self.records[layer.name]
        if name in self._residuals:
            if not is_fingerprint(record.stored, *residual_tensors(weight).values()):
                raise ValueError(self._another(layer, "residual"))
            return weight
        saved = read_stored(name, record, layer.shape, self._checkpoint.starts, torch.device("cpu"))
        if saved is not None:
            return saved
        known = self._as_trained(layer, weight)
        dense = ops.dequantize(known) if isinstance(known, QuantizedWeight) else known
        [residual] = residuals_of([dense], [self.tensors(name, factors).base], record.form, [name])
        if not is_fingerprint(record.stored, *residual_tensors(residual).values()):
            self._other_bits.append(name)
        return residual

    def _as_trained(self, layer: Layer, weight: Weight) -> Weight:
        """The weight as it was in the training: codes as they are, a dense one in the dtype that the record names.

        Raises:
            ValueError: it is another one.
        """
        recorded = self.records[layer.name].weight
        dense = ops.dequantize(weight) if isinstance(weight, QuantizedWeight) else weight
        found = match(recorded, dense)
        if found is Match.OTHER:
            raise ValueError(self._another(layer, "weight"))
        if found is Match.ROUNDED:
            self._narrower[layer.name] = dense.dtype
        return weight if isinstance(weight, QuantizedWeight) else weight.to(dtype_of(recorded))

    def tensors(self, name: str, factors: Matrices) -> LayerTensors:
        """What the files hold of a layer, whose pair in PEFT's file is given."""
        config, record = self._checkpoint.config, self.records[name]
        identity = INIT_METHODS[config.init].identity(config)
        origin = Origin(record.r, record.scaling, config.init, config.use_adalora, identity)
        return self._checkpoint.read_layer(name, *factors, origin)

    def doubts(self) -> list[PissaWarning]:
        return base_doubts(self._checkpoint, self._narrower, self._other_bits)

    def _another(self, layer: Layer, what: str) -> str:
        return (
            f"{self.source.folder} is not the base that {self._checkpoint.folder} was trained on: the {what} of layer "
            f"{layer.name} has other values. Give the same checkpoint; to merge into another base all the same, "
            f"convert the adapter to a plain LoRA first"
        )


def read_adapter(path: Path, source: Source, initial: str | os.PathLike[str] | None) -> Adapter:
    """The adapter in a folder, for a checkpoint that is the base, or a residual that lacks its start.

    Raises:
        ValueError: it cannot be read, or does not belong to the checkpoint.
    """
    folder = LoraFolder.read(path)
    is_residual = (source.folder / INITIAL_FOLDER / ADAPTER_CONFIG).is_file()
    at_start = LoraFolder.read(source.folder / INITIAL_FOLDER) if is_residual else None
    if (path / PISSA_RECORD).is_file():
        check_unused(f"{path} is an adapter of pissa", initial=initial)
        layers = () if at_start is None else [name for part in at_start.factors.values() for name in part.layers]
        return Ours(path, folder, source, layers)
    init = folder.config["init_lora_weights"]
    if at_start is not None:
        check_unused(f"{source.folder} has the initial adapter itself", initial=initial)
        if init not in PLAIN_STARTS:
            raise ValueError(
                f"{folder.config_path}: init_lora_weights is {init!r}, which changes the base, and {source.folder} is "
                "a residual: an adapter on it starts from its pissa_init"
            )
        start_from_initial(folder, at_start)  # checks that it can be the start of this one
        return Adapter(folder, source, ON_RESIDUAL)
    initial = residual_of(folder) if initial is None else initial
    base = source.folder if isinstance(init, str) and init.startswith("pissa") and initial is None else None
    return Converted(Foreign.read(path, base, initial, None), source, initial)


ON_RESIDUAL = "an adapter on a residual, which is the base"


def read_weight(layer: Layer, source: Source) -> Weight:
    """The matrix of a layer, a view of the mapped file if it is one tensor there."""
    if layer.entries:
        return from_state({entry: source.read(tensor) for entry, tensor in layer.entries.items()})
    return matrix_of(layer.parts, source).flatten(1)


def _dense(weight: Weight) -> Base:
    if isinstance(weight, QuantizedWeight):
        return Base(ops.dequantize(weight), lambda x: ops.linear(x, weight))
    return Base(weight.to(torch.float32, copy=True), lambda x: ops.linear(x, weight))
