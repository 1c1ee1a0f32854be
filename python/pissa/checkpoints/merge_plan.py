"""What becomes of each tensor of a checkpoint when an adapter is merged into it, by names and shapes alone. What cannot
be merged is refused here, before anything is written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pissa.base.bitsandbytes import from_state
from pissa.base.kinds import adopted, base_of
from pissa.checkpoints.packed import packed_layers
from pissa.checkpoints.plan import Layer, Plan, Unit, in_order, linear_layers, matrix_shape, new_shards
from pissa.config import IMPLICIT, Form
from pissa.files.lora_folder import LoraFactors, LoraFolder
from pissa.files.messages import shown
from pissa.files.model_folder import Composition, Part, meta_model
from pissa.files.peft_layout import MAGNITUDE, PREFIX, base_weight_key, is_mirrored
from pissa.files.tensor_file import Source
from pissa.layers.experts import is_transposed


class Planner:
    """Finds in a checkpoint what an adapter changes.

    Args:
        form: how the linear layers, without the output layer, are written: IMPLICIT for dense.

    Raises:
        ValueError: a checkpoint that cannot be read.
    """

    def __init__(self, source: Source, adapter: LoraFolder, form: Form = IMPLICIT) -> None:
        self.source, self.adapter, self.form = source, adapter, form
        self.model: Any = meta_model(source.folder)
        self.packed = packed_layers(source.names)
        self.codes = {tensor for entries in self.packed.values() for tensor in entries.values()}
        beside = self.codes - {f"{name}.weight" for name in self.packed}
        self.composition = Composition(self.model, [name for name in source.names if name not in beside])
        self.tensors = dict(
            [*self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers(remove_duplicate=False)]
        )
        self.sharing: dict[int, list[str]] = {}
        for name, value in self.tensors.items():
            self.sharing.setdefault(id(value), []).append(name)
        linears = {name: module for name, module in self.model.named_modules() if _is_linear(module)}
        self.linears = [name for name in linears if len(self._sharing(f"{name}.weight")) == 1]
        self.quantised: set[str] = set()
        if form != IMPLICIT:  # as transformers does it, which quantises no output layer
            output = self.model.get_output_embeddings()
            self.quantised = {name for name in self.linears if linears[name] is not output}

    def plan(self) -> Plan:
        """The plan of a merge.

        Raises:
            ValueError: what cannot be merged, naming the layer or the tensor.
        """
        units = [self.unit_of(factors) for factors in self.adapter.factors.values()]
        adapted = {layer.name for unit in units for layer in unit.layers}
        for name in self.linears if self.packed else self.quantised:
            if name not in adapted:
                layer = self._layer(name, False, 2)
                units += [Unit(name, (layer,))] if layer.entries or layer.is_packed else []
        units += self._beside_factors(adapted)
        self._check_changed_once(units)
        changed = {tensor for unit in units for tensor in unit.tensors}
        if left := sorted(self.codes - changed):
            raise ValueError(
                f"{self.source.path_of(left[0])}: tensor {shown(left[0])} is a part of codes of which only "
                f"pissa.load makes a model; {_IN_MEMORY}"
            )
        dense = [name for name in linear_layers(self.model) if name not in self.quantised]
        return Plan(self.source, in_order(self.source, units), new_shards(self.source, units), dense)

    def parts_of(self, name: str) -> tuple[Part, ...]:
        """What a parameter that is no matrix [in, out] consists of.

        Raises:
            ValueError: the model or the checkpoint has no such parameter.
        """
        if name not in self.tensors:
            raise ValueError(f"the model in {self.source.folder} has no {name}")
        for other in [name, *self._sharing(name)]:  # the checkpoint has a tied parameter under one of its names
            with suppress(ValueError):
                return self.composition.matrix(other, transposed=False)
        return self.composition.matrix(name, transposed=False)

    def _sharing(self, name: str) -> list[str]:
        """The names of all parameters that are this one."""
        return self.sharing[id(self.tensors[name])]

    # -- layers

    def unit_of(self, factors: LoraFactors) -> Unit:
        """The unit of a target of the adapter; raises as `plan`."""
        layers = self._experts(factors) if factors.is_fused else (self._adapted(factors),)
        needed = (factors.out, math.prod(factors.row))
        if layers[0].shape != (needed[::-1] if layers[0].mirrored else needed):
            raise ValueError(
                f"layer {layers[0].name} is {list(layers[0].shape)} in {self.source.folder}, and its factors in "
                f"{self.adapter.weights.path} are for {list(needed)}: it is not the base of the adapter"
            )
        return Unit(factors.target, layers, factors)

    def _adapted(self, factors: LoraFactors) -> Layer:
        """The layer of factors that are not those of fused experts."""
        name = factors.layers[0]
        module = self._module(name)
        try:
            base = adopted(module)
        except TypeError as error:
            raise ValueError(f"layer {name} is {error}; {_IN_MEMORY}") from None
        if base is None and factors.target == name:
            raise ValueError(f"layer {name} is a {type(module).__name__}, which is not known here; {_IN_MEMORY}")
        kind = nn.Linear if base is None else base.kind
        if others := [other for other in self._sharing(f"{name}.weight") if other != f"{name}.weight"]:
            raise ValueError(
                f"layer {name} shares its weight with {others[0]}, which would change too; {_IN_MEMORY}, or untie them "
                "in the checkpoint first"
            )
        if self.adapter.config["use_dora"] and kind not in (nn.Linear, Conv1D):
            raise ValueError(
                f"layer {name} is a {type(module).__name__}, and use_dora is for linear layers; {_IN_MEMORY}"
            )
        key = base_weight_key(name)
        layer = self._layer(name, kind in (Conv1D, nn.Embedding), module.weight.dim())
        return replace(layer, own_key=key if key in self.adapter.other_keys else None)

    def _experts(self, factors: LoraFactors) -> tuple[Layer, ...]:
        key, (path, _, leaf) = factors.target, factors.target.rpartition(".")
        module = self._module(path)
        weights = getattr(module, leaf, None)
        if not isinstance(weights, nn.Parameter) or weights.dim() != 3 or len(weights) != len(factors.layers):
            raise ValueError(
                f"{self.adapter.weights.path} has factors of {len(factors.layers)} experts for {key}, which the model "
                f"in {self.source.folder} does not have"
            )
        with self._blamed(key):
            stack = self.composition.stack(key, len(weights), is_transposed(module))
        mirrored = is_mirrored(module)
        return tuple(
            Layer(name, parts, *matrix_shape(name, parts, self.source), is_expert=True, mirrored=mirrored)
            for name, parts in zip(factors.layers, stack, strict=True)
        )

    def _layer(self, name: str, transposed: bool, dimensions: int) -> Layer:
        with self._blamed(name):
            parts = self.composition.matrix(f"{name}.weight", transposed)
            form = self.form if name in self.quantised else IMPLICIT
            entries = self.packed.get(parts[0].tensor.removesuffix(".weight"), {})
            if not entries:
                shape, dtype = matrix_shape(name, parts, self.source, dimensions)
                return Layer(name, parts, shape, dtype, form, transposed=transposed)
            weight = from_state({entry: self.source.read(tensor) for entry, tensor in entries.items()})
            return Layer(name, parts, weight.shape, self.model.config.dtype or torch.float32, form, entries=entries)

    def _module(self, name: str) -> Any:
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"the model in {self.source.folder} has no layer {name}, which {self.adapter.weights.path} adapts: it "
                "is not the base of the adapter"
            ) from None

    @contextmanager
    def _blamed(self, name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.source.folder}: layer {name}: {error}") from error

    # -- what the adapter holds beside factors

    def _beside_factors(self, adapted: set[str]) -> list[Unit]:
        """The units of tensors that were trained beside the factors, or that PEFT has saved with them."""
        weights, units = self.adapter.weights, dict[str, Unit]()
        of_layers = {base_weight_key(name) for name in adapted}
        for key in self.adapter.other_keys:
            place, _, leaf = key.removeprefix(PREFIX).rpartition(".")
            if key in of_layers or MAGNITUDE in (leaf, place.rpartition(".")[2]):
                continue
            unit = self._beside(key, place, leaf)
            assert unit.tensor is not None
            other = units.setdefault(unit.tensor, unit)
            if other is unit:
                continue
            are_whole = other.rows is unit.rows is None and other.scaling is unit.scaling is None
            if other.key is None or not (are_whole and torch.equal(weights.read(other.key), weights.read(key))):
                raise ValueError(
                    f"{weights.path}: tensors {shown(other.key)} and {shown(key)} are both for {unit.tensor} in "
                    f"{self.source.folder}; {_IN_MEMORY}"
                )
        self._check_shared(list(units.values()))
        return list(units.values())

    def _beside(self, key: str, place: str, leaf: str) -> Unit:
        path, shape = self.adapter.weights.path, self.adapter.weights.entries[key].shape
        rows, scaling = None, None
        if leaf == "trainable_tokens_delta":
            place = place.removesuffix(".token_adapter")
            name, rows = f"{place}.weight", self._rows(place)
        elif place.endswith(".lora_B") and leaf == "bias":
            place = place.removesuffix(".lora_B")
            name, scaling = f"{place}.bias", self.adapter.factors[place].scaling
        else:
            name = f"{place.removesuffix('.base_layer').removesuffix('.token_adapter')}.{leaf}"
        if name not in self.tensors:
            raise ValueError(f"{path}: tensor {shown(key)} is for no tensor of the model in {self.source.folder}")
        with self._blamed(name):
            parts = self.parts_of(name)
        entry = self.source.entry(parts[0].tensor)
        needed = entry.shape if rows is None else (len(rows), *entry.shape[1:])
        if parts != (Part(parts[0].tensor),) or shape != needed or parts[0].tensor in self.codes:
            raise ValueError(
                f"{path}: tensor {shown(key)} is {list(shape)}; needed: {list(needed)}, for {parts[0].tensor} in "
                f"{self.source.folder}. An embedding that was resized, or a weight that is not one dense tensor of the "
                f"checkpoint, cannot be replaced there; {_IN_MEMORY}"
            )
        return Unit(name, tensor=parts[0].tensor, key=key, rows=rows, scaling=scaling)

    def _rows(self, place: str) -> tuple[int, ...]:
        """The rows of an embedding that are trained."""
        indices = self.adapter.config.get("trainable_token_indices")
        if isinstance(indices, dict):
            indices = next((value for name, value in indices.items() if f".{place}".endswith(f".{name}")), None)
        return tuple(indices or ())

    def _check_shared(self, units: list[Unit]) -> None:
        """Refuses what would change a tied weight although the adapter has it for one of its layers only. Tokens of the
        input embeddings are trained for all of them."""
        saved = {key.removeprefix(PREFIX).replace(".base_layer.", ".") for key in self.adapter.other_keys}
        for unit in units:
            is_for_all = unit.rows is not None and self.tensors[unit.name] is self.model.get_input_embeddings().weight
            for other in [] if is_for_all else self._sharing(unit.name):
                if other != unit.name and other not in saved:
                    raise ValueError(
                        f"{self.adapter.weights.path}: tensor {shown(unit.key)} is for {unit.name}, which shares its "
                        f"values with {other} in {self.source.folder}; {_IN_MEMORY}"
                    )

    def _check_changed_once(self, units: list[Unit]) -> None:
        """Raises ValueError if two units write to a tensor."""
        for tensor, count in Counter(tensor for unit in units for tensor in unit.tensors).items():
            if count > 1:
                names = [unit.name for unit in units if tensor in unit.tensors]
                raise ValueError(
                    f"{self.source.path_of(tensor)}: tensor {shown(tensor)} is changed for {' and '.join(names)}; "
                    f"{_IN_MEMORY}"
                )


_IN_MEMORY = "merge in memory, with PeftModel.from_pretrained or PissaModel.from_pretrained and merge_and_unload"


def _is_linear(module: nn.Module) -> bool:
    """Whether the module computes what nn.Linear does."""
    return base_of(module).kind is nn.Linear and adopted(module) is not None
