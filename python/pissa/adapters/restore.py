"""Puts a saved adapter of ours into a model, bit for bit. Everything is checked before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor

from pissa.adapters.lora_folder import check_same_layers, rank_and_scaling
from pissa.adapters.peft_layout import select_trained_beside
from pissa.adapters.pissa_layout import PissaFolder
from pissa.adapters.vocabulary import VocabularyTensor, vocabulary
from pissa.base.digest import Match, dtype_of, holds, match
from pissa.base.stored import Expected, residuals_of
from pissa.base.weights import is_offloaded
from pissa.config import IMPLICIT
from pissa.containers.messages import quote
from pissa.containers.tensor_file import SAVED_FLOATS
from pissa.distributed import is_dtensor, is_of_an_engine, is_partitioned, shard_as
from pissa.layers.factory import check_values
from pissa.layers.layer import PissaLayer, pissa_layers
from pissa.notices import OtherDtypeWarning, OtherRoundingWarning, PissaWarning
from pissa.ops import QuantizedWeight


def restore(folder: PissaFolder, model: PeftModel, adapter_name: str) -> None:
    """Puts parameters and start factors into an existing adapter of the PissaModel. Nothing is decomposed, and nothing
    is changed before everything is known to fit."""
    restoration = _Restoration(folder, model, adapter_name)
    restoration.put()
    for doubt in base_doubts(folder.path, restoration.narrower or restoration.rounded_rest, restoration.other_bits):
        warnings.warn(doubt, stacklevel=3)  # the caller of from_pretrained or load_adapter


class _Restoration:
    """The adapter in a folder, read and checked against that of a PissaModel."""

    def __init__(self, folder: PissaFolder, model: PeftModel, adapter_name: str) -> None:
        self.folder, self.model, self.adapter_name = folder, model, adapter_name
        self.alone = len(model.peft_config) == 1
        base = model.base_model.model
        tables = vocabulary(model, adapter_name)
        self._check_not_partitioned(tables)
        check_values(base, adapter_name)
        self.layers = pissa_layers(base, adapter_name)
        self._check_layers()
        self.modules = select_trained_beside(model, adapter_name, self.layers, model.state_dict())
        self._check_headers(tables)

        tensors = folder.tensors
        self.others = {key: tensors.read(key) for key in tensors.entries if key in self.modules or key in tables}
        self.residuals: dict[str, Tensor | QuantizedWeight] = {}
        """The residuals that are to replace bases, as far as they exist."""
        for name, layer in self.layers.items():
            if folder.layers[name].form != layer.base.form:
                residual = folder.read_stored(name, layer.matrix_shape, layer.base.device)
                if residual is not None:
                    self.residuals[name] = residual
        # A weight that is stored as a residual, or will be, is compared by the residual.
        dense = {
            key: table
            for key, table in tables.items()
            if key in self.others
            and not table.is_stored
            and not any(table.is_of(self.layers[name]) for name in self.residuals)
        }
        self._check_vocabulary(dense)
        self.new = dense if self.alone else {}
        """The model's embeddings that the folder replaces."""
        self.narrower: dict[str, tuple[torch.dtype, torch.dtype]] = {}
        self.other_bits: list[str] = []
        for name, layer in self.layers.items():
            if self._match_base(name, layer) is Match.ROUNDED:
                self.narrower[name] = layer.dense_dtype, dtype_of(folder.layers[name].weight)
            self._check_form(name, layer)
        self.rounded_rest = self._match_rest(base)
        self.starts = {name: folder.read_starts(name) for name in self.layers}
        self.deltas = {name: folder.read_deltas(name) for name in self.layers}
        self.lengths = {name: folder.read_lengths(name) for name in self.layers if folder.config.use_dora}

    def put(self) -> None:
        """Changes the model."""
        for key, table in self.new.items():
            if not is_offloaded(table.module):
                table.put(self.others[key])
        for name, layer in self.layers.items():
            self._put_layer(name, layer)
        self.model.peft_config[self.adapter_name].init = self.folder.config.init  # an existing adapter may differ
        if self.modules:
            trained = {key: shard_as(parameter, self.others[key]) for key, parameter in self.modules.items()}
            set_peft_model_state_dict(self.model, trained, self.adapter_name)

    @torch.no_grad()
    def _put_layer(self, name: str, layer: PissaLayer) -> None:
        record, starts, is_same = self.folder.layers[name], self.starts[name], name not in self.narrower
        device, recorded = layer.device_of(self.adapter_name), dtype_of(record.weight)
        if record.form != layer.base.form and starts.base is not None:
            base, residual = starts.base.to(device), self.residuals.get(name)
            if residual is None:
                weight = layer.base.matrix()
                [residual] = residuals_of([weight.to(recorded) if is_same else weight], [base], record.form, [name])
            if isinstance(residual, Tensor):
                residual = residual.to(layer.dense_dtype)
            if is_same:
                layer.weight_fingerprint.remember(layer.base, record.weight)
            layer.store_base(residual, base, self.folder.config)
            if layer.residual_fingerprint.match(layer.base, record.stored) is not Match.SAME:
                self.other_bits.append(name)
                if isinstance(layer.base.residual, Tensor) and not holds(layer.dense_dtype, recorded):
                    self.narrower[name] = layer.dense_dtype, recorded
        layer.share_start(self.adapter_name, starts.own.to(device))
        for delta, saved in zip(layer.deltas(self.adapter_name), self.deltas[name], strict=True):
            delta.copy_(shard_as(delta, saved))
        if name in self.lengths:
            layer.magnitude(self.adapter_name).set(*self.lengths[name])

    # -- whether it fits

    def _check_not_partitioned(self, tables: Mapping[str, VocabularyTensor]) -> None:
        adapters = (parameter for name, parameter in self.model.named_parameters() if ".lora_" in name)
        if any(map(is_partitioned, adapters)) or any(map(is_of_an_engine, self.model.modules())):
            raise ValueError(
                "the model is partitioned by DeepSpeed ZeRO-3, its adapters too: load the adapter before "
                "deepspeed.initialize, or resume with the engine's load_checkpoint [P051]"
            )
        for key, table in tables.items():
            if key in self.folder.tensors.entries and is_partitioned(table.parameter):
                raise ValueError(
                    f"{self.folder.path} has the base's {key}, which DeepSpeed ZeRO-3 has partitioned here. Load the "
                    "model without zero.Init, the folder onto it, and let deepspeed.initialize partition it then [P051]"
                )

    def _check_layers(self) -> None:
        name, layers = self.adapter_name, self.layers.items()
        check_same_layers(
            f"{self.folder.path} does not fit adapter {name!r}",
            "in the model",
            {path: rank_and_scaling(layer.r[name], layer.scaling[name]) for path, layer in layers},
            "in the folder [P056]",
            {path: rank_and_scaling(record.r, record.scaling) for path, record in self.folder.layers.items()},
        )
        if any(name in layer.merged_adapters for _, layer in layers):
            raise ValueError(f"adapter {name!r} is merged: call unmerge_adapter before loading into it")

    def _check_headers(self, tables: Mapping[str, VocabularyTensor]) -> None:
        """Checks that the files contain exactly the tensors of these layers and modules, and perhaps embeddings, with
        the right names, dtypes and shapes."""
        folder, entries = self.folder, self.folder.tensors.entries
        needed: dict[str, tuple[Expected, str]] = {}
        codes = dict(needed)
        for key, table in tables.items():
            if key in entries:
                demand, rows = "an embedding", entries[key].shape[:1]
                if rows and rows != table.parameter.shape[:1]:
                    demand += f"; if it was resized, call model.resize_token_embeddings({rows[0]}) before loading"
                needed[key] = (table.parameter.shape, SAVED_FLOATS), demand
        for key, value in self.modules.items():
            allowed = SAVED_FLOATS if value.is_floating_point() else (value.dtype,)
            needed[key] = (value.shape, allowed), "a module that is trained beside the layers"
        for name, layer in self.layers.items():
            size = layer.matrix_shape
            demand = (
                f"layer {name}, whose weight is {list(size)} in this model: the file is damaged, or belongs to another "
                "base"
            )
            for part, shape in folder.layers[name].shapes(size, dora=folder.config.use_dora).items():
                needed[f"{name}.{part}"] = (shape, (torch.float32,)), demand
            for key, expected in folder.stored_shapes(name, size).items():
                codes[key] = expected, f"the residual of layer {name}"
        for file, tensors in ((folder.tensors, needed), (folder.codes_file, codes)):
            if file is not None:
                for key, (expected, demand) in tensors.items():
                    file.expect(key, *expected, demand)
                if unknown := file.entries.keys() - tensors:
                    raise ValueError(f"{file.path}: tensor {quote(min(unknown))} belongs to no part of the adapter")

    def _check_vocabulary(self, tables: Mapping[str, VocabularyTensor]) -> None:
        """Checks that the folder's embeddings can replace `tables`, the model's own. If the model has other adapters,
        they were trained with the current ones."""
        for key, table in tables.items():
            saved = self.others[key]
            if self.alone and not is_offloaded(table.module):
                twins = (other for other in tables if tables[other].parameter is table.parameter)
                if all(torch.equal(self.others[other], saved) for other in twins):
                    continue
                reason = "another tensor of the file, which in this model shares its weight: untie them first"
            elif torch.equal(saved.to(table.parameter.dtype), table.value({})):
                continue
            elif self.alone:
                reason = "the model's embedding, which is offloaded: give it a device of its own in device_map"
            else:
                reason = (
                    "the model's embedding, which the model's other adapters were trained with. Load the folder onto a "
                    "base of its own with from_pretrained [P057]"
                )
            raise ValueError(f"{self.folder.tensors.path}: tensor {key!r} differs from {reason}")

    def _match_base(self, name: str, layer: PissaLayer) -> Match:
        """Compares a layer's base with the one that the adapter was trained on. If the folder contains a weight or a
        residual that will replace the base, compares that instead. Returns SAME, or ROUNDED if the model's dtype does
        not hold its values; a different base is refused."""
        folder, record = self.folder, self.folder.layers[name]
        own = layer.weight_fingerprint
        if name in self.residuals:
            if not folder.is_fed_back(name):
                return Match.SAME
            if own.match(layer.base, record.weight) is not Match.OTHER:
                return Match.SAME  # also with other roundings: the codes are those of the training
        key = next((key for key, table in self.new.items() if table.is_of(layer)), None)
        if key is not None:
            weight = self.others[key].to(layer.base.parameter.dtype)
            result = match(record.weight, layer.base.with_parameter(weight).matrix())
            if result is Match.OTHER:
                raise ValueError(
                    f"{folder.tensors.path}: tensor {key!r} is not the weight that layer {name} was trained on: take "
                    "the file from a copy"
                )
            return result
        if (result := own.match(layer.base, record.weight)) is not Match.OTHER:
            return result
        raise self._another_base(f"the first layer that differs is {name}: its weight", record.weight)

    def _match_rest(self, base: Any) -> dict[str, tuple[torch.dtype, torch.dtype]]:
        """Compares the rest of the base with that of the training. Returns tensors whose dtype does not hold its
        values, with that dtype and theirs; other values are refused."""
        recorded, rounded = self.folder.rest, {}
        for name, (result, tensor) in self.model.rest.compare(base, recorded).items():
            if result is Match.OTHER:
                raise self._another_base(f"{name}, which no adapter changes,", recorded[name])
            rounded[name] = tensor.dtype, dtype_of(recorded[name])
        return rounded

    def _another_base(self, what: str, recorded: str) -> ValueError:
        return ValueError(
            f"the model is not the base that {self.folder.path} was trained on: {what} has other values, in "
            f"{dtype_of(recorded)}, in which it was trained. Load the same checkpoint; to apply the adapter to "
            "another base all the same, use peft.PeftModel.from_pretrained, for which the folder is a plain LoRA [P053]"
        )

    def _check_form(self, name: str, layer: PissaLayer) -> None:
        """Checks that a layer's base is stored like the one that the adapter was trained on, or can still become so: if
        it is dense and the model has no adapter on it yet."""
        folder, record, base = self.folder, self.folder.layers[name], layer.base
        if record.form != base.form and is_dtensor(base.parameter):
            raise ValueError(
                f"{folder.path} keeps the base of layer {name} as {record.form.describe()}, and in the model its "
                "weight is sharded by fully_shard, which keeps it: load the folder first, shard the model then [P049]"
            )
        if self.alone and self.adapter_name not in layer.lora_start and base.form == IMPLICIT:
            return
        own = layer.residual_fingerprint
        if base.form != record.form or (base.form != IMPLICIT and own.match(base, record.stored) is not Match.SAME):
            raise ValueError(
                f"{folder.path} was trained on another base function: the residual of layer {name} was "
                f"{record.form.describe()} and is {base.form.describe()} in this model, or has other "
                "values. Load the folder onto an unmodified base of its own with from_pretrained [P054]"
            )


# -- doubts about the base


def base_doubts(
    folder: Path, narrower: Mapping[str, tuple[torch.dtype, torch.dtype]], other_bits: Iterable[str]
) -> list[PissaWarning]:
    """Returns the warnings for a base that is not, bit for bit, the one of the training.

    Args:
        narrower: the layers with a base in a dtype that does not hold its values, with that dtype and theirs.
        other_bits: the layers with a residual that was computed again and has different bits.
    """
    doubts: list[PissaWarning] = []
    if narrower:
        name, (dtype, was) = next(iter(narrower.items()))
        doubts.append(
            OtherDtypeWarning(
                f"{folder} was written for a base in {was}, which is in {dtype} here: {len(narrower)} weights, {name} "
                "the first, differ by roundings, as far as a sample of their values shows. For the exact function, "
                f"load the base in {was}."
            )
        )
    if rounded := [name for name in other_bits if name not in narrower]:
        doubts.append(
            OtherRoundingWarning(
                f"The residual of {len(rounded)} layers, {rounded[0]} the first, differs in some bits from the one "
                f"that {folder} was trained with: this machine rounds differently. The function is the same up to the "
                "rounding of a few weights."
            )
        )
    return doubts
