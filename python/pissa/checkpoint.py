"""Reading back what pissa.io wrote: checked as a whole first, then put into the model to the bit."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pissa import ops
from pissa.config import IMPLICIT, PissaConfig
from pissa.experts import places, unstack
from pissa.inject import pissa_layers
from pissa.io import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    FORMAT,
    PISSA_RECORD,
    PISSA_WEIGHTS,
    PREFIX,
    LayerRecord,
    residual_fingerprint,
)
from pissa.layer import PissaLayer
from pissa.stored import StartFactors, StoredLinear

if TYPE_CHECKING:
    from pissa.model import PissaModel


@dataclasses.dataclass(frozen=True)
class _LayerTensors:
    """The tensors of one layer, float32, as they were in memory."""

    a0: Tensor
    b0: Tensor
    da: Tensor
    db: Tensor
    base_a0: Tensor
    base_b0: Tensor


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An adapter read from a folder: every tensor is there, finite, and of the shape its rank demands."""

    folder: Path
    config: PissaConfig
    records: dict[str, LayerRecord]
    layers: dict[str, _LayerTensors]
    others: dict[str, Tensor]
    """What adapter_model.safetensors has beside the layers, as PEFT names it: modules_to_save, embeddings."""

    @staticmethod
    def read(directory: str | os.PathLike[str]) -> Checkpoint:
        """Reads the folder that `save_pretrained` wrote for one adapter.

        Raises:
            ValueError: no PiSSA adapter there, or a damaged file, naming the file and the tensor.
        """
        folder = Path(directory)
        config, records, experts = _read_record(folder)
        weights, starts = _File(folder / ADAPTER_WEIGHTS), _File(folder / PISSA_WEIGHTS)
        for path, (count, names) in experts.items():
            weights.unstack(path, count, names)
        layers = {name: _layer_tensors(name, record, weights, starts) for name, record in records.items()}
        starts.expect_empty()
        return Checkpoint(folder, config, records, layers, weights.tensors)

    def restore(self, model: PissaModel, adapter_name: str) -> None:
        """Puts parameters and start factors into an adapter that `model` has. Decomposes nothing.

        Raises:
            ValueError: the base or the adapter is not the one that was saved, naming the first layer that
                differs. Nothing has been changed then.
        """
        layers = pissa_layers(model.base_model.model, adapter_name)
        self._check_layers(layers, adapter_name, alone=len(model.peft_config) == 1)
        self._check_others(model, adapter_name)
        changed = [name for name, layer in layers.items() if not self._restore_layer(name, layer, adapter_name)]
        if self.others:
            set_peft_model_state_dict(model, self.others, adapter_name)
        if changed:
            warnings.warn(
                f"The residual of {len(changed)} layers, {changed[0]} the first, differs in some bits from "
                f"the one that {self.folder} was trained with: this machine rounds differently. The function "
                "is the same up to the rounding of a few weights.",
                UserWarning,
                stacklevel=4,
            )

    def _check_layers(self, layers: dict[str, PissaLayer], adapter_name: str, alone: bool) -> None:
        for name in [*layers, *self.records]:
            if name not in layers or name not in self.records:
                where = "folder" if name in self.records else "model"
                raise ValueError(f"{self.folder} does not fit the model: only in the {where} is layer {name} adapted")
        for name, layer in layers.items():
            self._check_base(name, layer)
            self._check_adapter(name, layer, adapter_name)
            fresh = alone and adapter_name not in layer.lora_start
            if not (fresh and layer.form == IMPLICIT):
                self._check_form(name, layer)

    def _check_base(self, name: str, layer: PissaLayer) -> None:
        tensors = self.layers[name]
        trained, shape = (len(tensors.b0), tensors.a0.shape[1]), layer.matrix_shape
        if trained != shape:
            raise ValueError(self._other_base(name, f"its weight is {shape}, not {trained}"))
        if layer.base_fingerprint() != self.records[name].weight:
            raise ValueError(self._other_base(name, "its weight has other values"))

    def _check_adapter(self, name: str, layer: PissaLayer, adapter_name: str) -> None:
        record, r, scaling = self.records[name], layer.r[adapter_name], float(layer.scaling[adapter_name])
        if (r, scaling) != (record.r, record.scaling):
            raise ValueError(
                f"{self.folder} does not fit adapter {adapter_name!r}: layer {name} has rank {r} and scaling "
                f"{scaling:g} in the model, {record.r} and {record.scaling:g} in the folder"
            )
        if adapter_name in layer.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged: call unmerge_adapter before loading into it")

    def _check_form(self, name: str, layer: PissaLayer) -> None:
        record = self.records[name]
        base = layer.unmerged_base
        if layer.form != record.form or (
            isinstance(base, StoredLinear) and residual_fingerprint(base.residual) != record.stored
        ):
            raise ValueError(
                f"{self.folder} was trained on another base function: the residual of layer {name} was "
                f"{record.form.describe()} and is {layer.form.describe()} in this model, or has other "
                "values. Load the folder onto an unmodified base of its own with from_pretrained"
            )

    def _other_base(self, name: str, difference: str) -> str:
        return (
            f"the model is not the base that {self.folder} was trained on; the first layer that differs is "
            f"{name}: {difference}. Load the same checkpoint, in a dtype that holds it without loss; to "
            "apply the adapter to another base all the same, use peft.PeftModel.from_pretrained, for which "
            "the folder is a plain LoRA"
        )

    def _check_others(self, model: PissaModel, adapter_name: str) -> None:
        state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        prefixes = tuple(f"{PREFIX}{name}.lora_" for name in self.records)
        expected = {key: value for key, value in state.items() if not key.startswith(prefixes)}
        # Embeddings that PEFT has saved with the adapter are the base's own tensors.
        known = {**model.state_dict(), **expected}
        path = self.folder / ADAPTER_WEIGHTS
        for key in [*expected, *self.others]:
            if key not in self.others:
                raise ValueError(f"{path}: tensor {key!r} is missing")
            if key not in known:
                raise ValueError(f"{path}: tensor {key!r} belongs to no part of the model")
            if self.others[key].shape != known[key].shape:
                raise ValueError(
                    f"{path}: tensor {key!r} is {tuple(self.others[key].shape)}, the model has "
                    f"{tuple(known[key].shape)}"
                )

    @torch.no_grad()
    def _restore_layer(self, name: str, layer: PissaLayer, adapter_name: str) -> bool:
        """Whether the base is, to the bit, the one that the adapter was trained on."""
        record, tensors = self.records[name], self.layers[name]
        device = layer.unmerged_base.weight.device
        origin = layer.origin(adapter_name, self.config)
        exact = True
        if record.form != layer.form:
            base_origin = record.base or origin
            a0, b0 = tensors.base_a0.to(device), tensors.base_b0.to(device)
            options = record.form.options()
            residual = ops.residual(layer.dense_base(), a0, b0, scaling=base_origin.scaling, **options)
            layer.store_base(residual, StartFactors(a0, b0, base_origin))
            exact = residual_fingerprint(residual) == record.stored
        layer.share_start(adapter_name, tensors.a0.to(device), tensors.b0.to(device), origin)
        for delta, saved in zip(layer.deltas(adapter_name), (tensors.da, tensors.db), strict=True):
            delta.copy_(saved)
        return exact


def _read_record(folder: Path) -> tuple[PissaConfig, dict[str, LayerRecord], dict[str, tuple[int, list[str]]]]:
    path = folder / PISSA_RECORD
    if not path.is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            raise ValueError(
                f"{folder} holds a plain PEFT adapter (no {PISSA_RECORD}): use peft.PeftModel.from_pretrained"
            )
        raise ValueError(f"{folder} holds no PiSSA adapter: there is no {PISSA_RECORD}")
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']} of pissa {content['pissa_version']} is not {FORMAT}")
        config = PissaConfig(**content["config"])
        experts = {path: (entry["count"], entry["weights"]) for path, entry in content.get("experts", {}).items()}
        return config, {name: LayerRecord.from_json(record) for name, record in content["layers"].items()}, experts
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


class _File:
    """A safetensors file whose tensors are taken out one by one, each checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.tensors: dict[str, Tensor] = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"{path}: tensor {name!r} holds NaN or Inf")

    def take(self, name: str, rows: int | None, columns: int | None) -> Tensor:
        """The float32 matrix of that name; None stands for any size."""
        if name not in self.tensors:
            raise ValueError(f"{self.path}: tensor {name!r} is missing")
        tensor = self.tensors.pop(name)
        tensor = tensor.flatten(1) if tensor.dim() > 2 else tensor
        shape = list(tensor.shape)
        wanted = [actual if size is None else size for size, actual in zip((rows, columns), shape, strict=False)]
        if tensor.dtype != torch.float32 or len(shape) != 2 or shape != wanted:
            raise ValueError(f"{self.path}: tensor {name!r} is {tensor.dtype} {shape}, expected torch.float32 {wanted}")
        return tensor

    def unstack(self, path: str, count: int, names: list[str]) -> None:
        """Puts the factors of each expert of a module in the place of PEFT's stack of them."""
        for name, place in places(path, names).items():
            a, b = (self.tensors.pop(f"{PREFIX}{place}.lora_{factor}.weight") for factor in "AB")
            for index, (expert_a, expert_b) in enumerate(unstack(a, b, count)):
                self.tensors[f"{PREFIX}{path}.{index}.{name}.lora_A.weight"] = expert_a
                self.tensors[f"{PREFIX}{path}.{index}.{name}.lora_B.weight"] = expert_b

    def expect_empty(self) -> None:
        if self.tensors:
            raise ValueError(f"{self.path}: tensor {next(iter(self.tensors))!r} belongs to no layer of the adapter")


def _layer_tensors(name: str, record: LayerRecord, weights: _File, starts: _File) -> _LayerTensors:
    r = record.r
    key_a, key_b = (
        ("lora_embedding_A", "lora_embedding_B")
        if f"{PREFIX}{name}.lora_embedding_A" in weights.tensors
        else ("lora_A.weight", "lora_B.weight")
    )
    a = weights.take(f"{PREFIX}{name}.{key_a}", 2 * r, None)
    b = weights.take(f"{PREFIX}{name}.{key_b}", None, 2 * r)
    a0, da = starts.take(f"{name}.a0", r, a.shape[1]), a[r:].contiguous()
    db, b0 = b[:, :r].contiguous(), b[:, r:].contiguous()
    if not torch.equal(a[:r], a0 + da):
        raise ValueError(
            f"{weights.path} and {starts.path} do not belong together, or one is damaged: the tensor lora_A "
            f"of layer {name} does not start with a0 + dA"
        )
    if record.base is None:
        return _LayerTensors(a0, b0, da, db, a0, b0)
    base_a0 = starts.take(f"{name}.base.a0", record.base.r, a0.shape[1])
    base_b0 = starts.take(f"{name}.base.b0", b0.shape[0], record.base.r)
    return _LayerTensors(a0, b0, da, db, base_a0, base_b0)
