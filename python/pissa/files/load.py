"""Reading back what pissa.files.save wrote: checked as a whole first, then put into the model to the bit."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from pissa.base.fingerprint import is_fingerprint
from pissa.base.stored import (
    Deltas,
    Expected,
    Origin,
    StartFactors,
    StoredLinear,
    residual_from,
    residual_shapes,
    residual_tensors,
)
from pissa.base.weights import execution_device, is_offloaded
from pissa.config import IMPLICIT, PissaConfig
from pissa.distributed import is_partitioned, sharded_as
from pissa.files.hub import adapter_folder
from pissa.files.json_file import shown
from pissa.files.plain_lora import PREFIX, Factors, Matrices, factors_of, is_of_a_layer, magnitude_key
from pissa.files.record import AdapterRecord, LayerRecord, read_config_alone
from pissa.files.save import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG_FILES, PISSA_RECORD, PISSA_WEIGHTS
from pissa.files.tensor_file import TensorFile
from pissa.files.vocabulary import VocabularyTensor, vocabulary
from pissa.layers.layer import PissaLayer, pissa_layers
from pissa.ops import QuantizedWeight
from pissa.ops.checks import FLOATS

if TYPE_CHECKING:
    from pissa.model.pissa_model import PissaModel

_FLOATS = (*FLOATS, torch.float64)


@dataclasses.dataclass(frozen=True)
class _LayerTensors:
    """What the files hold of one layer, float32, as it was in memory."""

    start: StartFactors
    deltas: Deltas
    base: StartFactors
    """What a stored base lacks; the adapter's own start unless the record says otherwise."""
    magnitude: tuple[Tensor, Tensor] | None
    """With DoRA, the trained lengths and the norms of the base's rows."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An adapter in a folder: what it says of itself, and the headers of its tensors. Their values are read, and all
    of it compared with a model, by `restore`."""

    folder: Path
    config: PissaConfig
    records: dict[str, LayerRecord]
    weights: TensorFile
    starts: TensorFile

    @staticmethod
    def read(folder: Path, config: PissaConfig | None = None) -> Checkpoint:
        """Reads the folder that `save_pretrained` wrote for one adapter.

        Args:
            config: the user's, in the place of the saved one.

        Raises:
            ValueError: no PiSSA adapter there, a damaged file, naming the file, or a `config` of another adapter.
            TypeError: `config` is no PissaConfig.
        """
        record = _read_record(folder)
        if config is not None:
            _check_alike(config, record.config, folder)
        weights, starts = TensorFile(folder / ADAPTER_WEIGHTS), TensorFile(folder / PISSA_WEIGHTS)
        return Checkpoint(folder, config or record.config, record.layers, weights, starts)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Says of an error in the block that it is the folder's configuration that does not fit the model.

        Raises:
            ValueError: naming the file, for what PEFT and our own layers make of a configuration.
        """
        try:
            yield
        except (ValueError, TypeError, AttributeError, LookupError, NotImplementedError, re.error) as error:
            if str(self.folder) in str(error):
                raise
            raise ValueError(
                f"the adapter that {self.folder / PISSA_RECORD} describes cannot be put on this model: {error}"
            ) from error

    def restore(self, model: PissaModel, adapter_name: str) -> None:
        """Puts parameters and start factors into an adapter that `model` has. Decomposes nothing.

        Raises:
            ValueError: the base or the adapter is not the one that was saved, naming the first layer that
                differs, or a damaged file, naming file and tensor. Nothing has been changed then.
        """
        if any(is_partitioned(parameter) for parameter in model.parameters()):
            raise ValueError(
                "the model is partitioned by DeepSpeed ZeRO-3: load the adapter before deepspeed.initialize, or resume "
                "with the engine's load_checkpoint"
            )
        layers = pissa_layers(model.base_model.model, adapter_name)
        alone = len(model.peft_config) == 1
        self._check_names(layers)
        for name, layer in layers.items():
            self._check_adapter(name, layer, adapter_name)
        modules, embeddings = _others(model, adapter_name)
        tables = vocabulary(model, adapter_name)
        embeddings |= {key: table.parameter for key, table in tables.items()}
        factors = factors_of(model.base_model.model, layers)
        self._check_headers(factors, layers, modules, embeddings)
        self.weights.verify()
        self.starts.verify()
        present = modules | embeddings
        others = {name: self.weights.read(name) for name in self.weights.names if name in present}
        tables = {key: table for key, table in tables.items() if key in others}
        residuals = {
            name: residual for name, layer in layers.items() if (residual := self._residual(name, layer)) is not None
        }
        # A weight that is kept as a residual, or will be, is compared by that.
        dense = {key: table for key, table in tables.items() if not table.is_stored}
        dense = {key: table for key, table in dense.items() if not any(table.is_of(layers[name]) for name in residuals)}
        self._check_vocabulary(dense, others, alone)
        new = dense if alone else {}
        for name, layer in layers.items():
            key = next((key for key, table in new.items() if table.is_of(layer)), "")
            self._check_base(name, layer, key, others.get(key), residuals.get(name))
            fresh = alone and adapter_name not in layer.lora_start
            if not (fresh and layer.form == IMPLICIT):
                self._check_form(name, layer)
        tensors = {
            name: self._read_layer(name, *pair, layers[name].origin(adapter_name, self.config))
            for part in factors
            for name, pair in self._unpacked(part)
        }

        for key, table in new.items():
            if not is_offloaded(table.module):
                table.put(others[key])
        changed = [
            name
            for name, layer in layers.items()
            if not self._restore_layer(name, layer, tensors[name], residuals.get(name), adapter_name)
        ]
        trained = {
            key: sharded_as(present[key], value)
            for key, value in others.items()
            if key in modules or (alone and key not in tables)
        }
        model.peft_config[adapter_name].init = self.config.init  # an adapter that was there may have started elsewhere
        if trained:
            set_peft_model_state_dict(model, trained, adapter_name)
        if changed:
            warnings.warn(
                f"The residual of {len(changed)} layers, {changed[0]} the first, differs in some bits from "
                f"the one that {self.folder} was trained with: this machine rounds differently. The function "
                "is the same up to the rounding of a few weights.",
                UserWarning,
                stacklevel=3,  # the caller of from_pretrained or load_adapter
            )

    def _check_names(self, layers: dict[str, PissaLayer]) -> None:
        for name in [*layers, *self.records]:
            if name not in layers or name not in self.records:
                where = "folder" if name in self.records else "model"
                raise ValueError(
                    f"{self.folder} does not fit the model: only in the {where} is layer {shown(name)} adapted"
                )

    def _check_adapter(self, name: str, layer: PissaLayer, adapter_name: str) -> None:
        record, r, scaling = self.records[name], layer.r[adapter_name], float(layer.scaling[adapter_name])
        if (r, scaling) != (record.r, record.scaling):
            raise ValueError(
                f"{self.folder} does not fit adapter {adapter_name!r}: layer {name} has rank {r} and scaling "
                f"{scaling:g} in the model, {record.r} and {record.scaling:g} in the folder"
            )
        if adapter_name in layer.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged: call unmerge_adapter before loading into it")

    def _check_headers(
        self,
        factors: list[Factors],
        layers: dict[str, PissaLayer],
        modules: dict[str, Tensor],
        embeddings: dict[str, Tensor],
    ) -> None:
        """Checks name, dtype and shape of every tensor."""
        unknown = {self.weights: set(self.weights.names), self.starts: set(self.starts.names)}
        for key, value in embeddings.items():
            if key in unknown[self.weights]:
                demand = "an embedding"
                if (rows := self.weights.shape(key)[:1]) != value.shape[:1]:
                    demand += f"; if it was resized, call model.resize_token_embeddings({rows[0]}) before loading"
                self.weights.expect(key, value.shape, _dtypes(value), demand)
        expected = [
            (self.weights, next(iter(part.layers)), part.shapes(2 * self.records[next(iter(part.layers))].r))
            for part in factors
        ]
        expected += [(self.starts, name, self._starts_of(name, layer)) for name, layer in layers.items()]
        if self.config.use_dora:
            expected += [
                (self.weights, name, {magnitude_key(name): layer.matrix_shape[:1]}) for name, layer in layers.items()
            ]
        for file, name, shapes in expected:
            demand = (
                f"layer {name}, whose weight is {list(layers[name].matrix_shape)} in this model: the file is "
                "damaged, or belongs to another base"
            )
            for key, shape in shapes.items():
                file.expect(key, shape, (torch.float32,), demand)
            unknown[file] -= shapes.keys()
        for key, value in modules.items():
            self.weights.expect(key, value.shape, _dtypes(value), "what is trained beside the layers")
        for name, layer in layers.items():
            for key, (shape, dtypes) in self._residual_shapes(name, layer).items():
                self.starts.expect(key, shape, dtypes, f"the residual of layer {name}")
                unknown[self.starts].discard(key)
        unknown[self.weights] -= modules.keys() | embeddings.keys()
        for file, names in unknown.items():
            if names:
                raise ValueError(f"{file.path}: tensor {shown(min(names))} belongs to no part of the adapter")

    def _check_vocabulary(self, tables: dict[str, VocabularyTensor], found: dict[str, Tensor], alone: bool) -> None:
        """Whether the model can have the embeddings that are in the folder. They are the base's own: other adapters
        that it carries were trained with those that it has."""
        for key, table in tables.items():
            if alone and not is_offloaded(table.module):
                twins = (other for other in tables if tables[other].parameter is table.parameter)
                if all(torch.equal(found[other], found[key]) for other in twins):
                    continue
                reason = "another tensor of the file, which in this model shares its weight: untie them first"
            elif torch.equal(found[key].to(table.parameter.dtype), table.value({})):
                continue
            elif alone:
                reason = "the model's embedding, which is offloaded: give it a device of its own in device_map"
            else:
                reason = (
                    "the model's embedding, which the model's other adapters were trained with. Load the folder onto a "
                    "base of its own with from_pretrained"
                )
            raise ValueError(f"{self.weights.path}: tensor {key!r} differs from {reason}")

    def _check_base(
        self, name: str, layer: PissaLayer, key: str, weight: Tensor | None, residual: Tensor | QuantizedWeight | None
    ) -> None:
        """Compares the base that the layer will have: the weight of that key, or the residual, out of the files if they
        have it."""
        record = self.records[name]
        if residual is not None:
            if not is_fingerprint(record.stored, *residual_tensors(residual).values()):
                raise ValueError(
                    f"{self.folder / PISSA_RECORD} and {self.starts.path} do not belong together, or one is damaged: "
                    f"the residual of layer {name} is not the one that was saved"
                )
            return
        if weight is not None:
            if not layer.weight_is(weight, record.weight):
                dtype = layer.unmerged_base.weight.dtype
                raise ValueError(
                    f"{self.weights.path}: tensor {key!r} is, in the model's {dtype}, not the weight that layer {name} "
                    "was trained on: load the model in a dtype that holds it without loss, or take the file from a copy"
                )
        elif not layer.base_is(record.weight):
            raise ValueError(
                f"the model is not the base that {self.folder} was trained on; the first layer that differs is "
                f"{name}: its weight has other values. Load the same checkpoint, in a dtype that holds it without "
                "loss; to apply the adapter to another base all the same, use peft.PeftModel.from_pretrained, for "
                "which the folder is a plain LoRA"
            )

    def _check_form(self, name: str, layer: PissaLayer) -> None:
        record = self.records[name]
        base = layer.unmerged_base
        if layer.form != record.form or (isinstance(base, StoredLinear) and not layer.residual_is(record.stored)):
            raise ValueError(
                f"{self.folder} was trained on another base function: the residual of layer {name} was "
                f"{record.form.describe()} and is {layer.form.describe()} in this model, or has other "
                "values. Load the folder onto an unmodified base of its own with from_pretrained"
            )

    def _unpacked(self, factors: Factors) -> Iterable[tuple[str, Matrices]]:
        a, b = (self.weights.read(key) for key in factors.keys)
        return factors.unpack(a, b).items()

    def _read_layer(self, name: str, a: Tensor, b: Tensor, origin: Origin) -> _LayerTensors:
        record, read = self.records[name], self.starts.read
        a0, da = read(f"{name}.a0"), a[record.r :].contiguous()
        db, b0 = b[:, : record.r].contiguous(), b[:, record.r :].contiguous()
        if not torch.equal(a[: record.r], a0 + da):
            raise ValueError(
                f"{self.weights.path} and {self.starts.path} do not belong together, or one is damaged: the tensor "
                f"lora_A of layer {name} does not start with a0 + dA"
            )
        start, deltas = StartFactors(a0, b0, origin), Deltas(da, db)
        if self.config.use_adalora:
            deltas = Deltas(read(f"{name}.delta_a"), db, read(f"{name}.delta_e"))
            # Not to the bit: other machines sum norms in another order.
            if not torch.allclose(start.change(deltas)[0], da, rtol=1e-5, atol=1e-6 * float(a0.abs().max())):
                raise ValueError(
                    f"{self.weights.path} and {self.starts.path} do not belong together, or one is damaged: the tensor "
                    f"lora_A of layer {name} is not made of delta_a and delta_e"
                )
        base = start
        if record.base is not None:
            base = StartFactors(read(f"{name}.base.a0"), read(f"{name}.base.b0"), record.base)
        magnitude = (self.weights.read(magnitude_key(name)), read(f"{name}.norm")) if self.config.use_dora else None
        return _LayerTensors(start, deltas, base, magnitude)

    @torch.no_grad()
    def _restore_layer(
        self,
        name: str,
        layer: PissaLayer,
        tensors: _LayerTensors,
        residual: Tensor | QuantizedWeight | None,
        adapter_name: str,
    ) -> bool:
        """Whether the base is, to the bit, the one that the adapter was trained on."""
        record = self.records[name]
        device = layer.device_of(adapter_name)
        exact = True
        if record.form != layer.form:
            base = tensors.base.to(device)
            if residual is None:
                residual = layer.residual(base, record.form)
            else:
                layer.learn_base_fingerprint(record.weight)
            layer.store_base(residual, base, self.config)
            exact = layer.residual_is(record.stored)
        layer.share_start(adapter_name, tensors.start.to(device))
        for delta, saved in zip(layer.deltas(adapter_name), tensors.deltas, strict=True):
            if delta is not None and saved is not None:
                delta.copy_(sharded_as(delta, saved))
        if tensors.magnitude is not None:
            layer.magnitude(adapter_name).set(*tensors.magnitude)
        return exact

    def _starts_of(self, name: str, layer: PissaLayer) -> dict[str, tuple[int, ...]]:
        """The float32 tensors of a layer in pissa.safetensors, with their shapes."""
        record, (rows, columns) = self.records[name], layer.matrix_shape
        starts: dict[str, tuple[int, ...]] = {f"{name}.a0": (record.r, columns)}
        if record.base is not None:
            starts |= {f"{name}.base.a0": (record.base.r, columns), f"{name}.base.b0": (rows, record.base.r)}
        if self.config.use_adalora:
            starts |= {f"{name}.delta_a": (record.r, columns), f"{name}.delta_e": (record.r, 1)}
        if self.config.use_dora:
            starts |= {f"{name}.norm": (rows,)}
        return starts

    def _residual_shapes(self, name: str, layer: PissaLayer) -> dict[str, Expected]:
        """The tensors of a layer's residual in pissa.safetensors; none where the file has none."""
        shapes = residual_shapes(self.records[name].form, layer.matrix_shape)
        keys = {f"{name}.base.{part}": expected for part, expected in shapes.items()}
        return keys if self.records[name].stored and keys.keys() & set(self.starts.names) else {}

    def _residual(self, name: str, layer: PissaLayer) -> Tensor | QuantizedWeight | None:
        """The residual that the layer's base, which is dense, is to be replaced by, where the folder has it."""
        record, device = self.records[name], execution_device(layer.unmerged_base)
        if record.form == layer.form or not (keys := self._residual_shapes(name, layer)):
            return None
        parts = {key.rpartition(".")[2]: self.starts.read(key).to(device) for key in keys}
        return residual_from(parts, record.form, layer.matrix_shape)


def _dtypes(value: Tensor) -> tuple[torch.dtype, ...]:
    """What a file may hold of it."""
    return _FLOATS if value.is_floating_point() else (value.dtype,)


def read_config(model_id: str | os.PathLike[str], *, subfolder: str | None = None, **kwargs: Any) -> PissaConfig:
    """The configuration of an adapter, or the one that `PissaConfig.save_pretrained` wrote, out of a folder or a
    repository of the Hub; see `PissaConfig.from_pretrained`.

    Raises:
        ValueError: neither is there, or a damaged file, naming the file.
    """
    folder = adapter_folder(model_id, CONFIG_FILES, subfolder=subfolder, **kwargs)
    if not os.path.isfile(folder / PISSA_RECORD) and os.path.isfile(folder / ADAPTER_CONFIG):
        config = read_config_alone(folder / ADAPTER_CONFIG)
        if config is not None:
            return config
    return _read_record(folder).config


PissaConfig.reader = staticmethod(read_config)


def _read_record(folder: Path) -> AdapterRecord:
    if not os.path.isfile(folder / PISSA_RECORD):  # Path.is_file fails where a name is too long
        if os.path.isfile(folder / ADAPTER_CONFIG):
            raise ValueError(
                f"{folder} holds a plain PEFT adapter (no {PISSA_RECORD}): use peft.PeftModel.from_pretrained, or "
                "peft.PeftConfig.from_pretrained for its configuration"
            )
        raise ValueError(f"{folder} holds no PiSSA adapter: there is no {PISSA_RECORD}")
    return AdapterRecord.read(folder / PISSA_RECORD)


def _check_alike(config: PissaConfig, saved: PissaConfig, folder: Path) -> None:
    """Whether the user's configuration describes the adapter in the folder, as far as `restore` does not see to it: it
    compares layers, ranks, scalings and tensors."""
    if not isinstance(config, PissaConfig):
        raise TypeError(
            f"config must be a pissa.PissaConfig, got {type(config).__name__}: pissa.PissaConfig.from_pretrained reads "
            "the one in the folder"
        )
    for name in ("init", "svd", "svd_passes", "seed", "form", "use_adalora", "use_dora"):
        given, needed = getattr(config, name), getattr(saved, name)
        if given != needed:
            raise ValueError(
                f"config: {name} is {given!r}, the adapter in {folder} was saved with {needed!r}: leave config out, or "
                "change the one that pissa.PissaConfig.from_pretrained reads there"
            )


def _others(model: PissaModel, adapter_name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the model has of the tensors that adapter_model.safetensors holds beside the layers', under PEFT's names:
    modules_to_save and trained tokens, and embeddings, which PEFT saves if it is asked to or if they were resized."""
    adapted = pissa_layers(model.base_model.model)
    layers = pissa_layers(model.base_model.model, adapter_name)
    trained = {f"{PREFIX}{name}.{key}" for name, layer in layers.items() for key in layer.state_keys(adapter_name)}
    state = {key: value for key, value in model.state_dict().items() if key not in trained}
    modules, with_embeddings = (
        {
            key: value
            for key, value in get_peft_model_state_dict(
                model, state_dict=state, adapter_name=adapter_name, save_embedding_layers=embeddings
            ).items()
            if not is_of_a_layer(key, adapted)
        }
        for embeddings in (False, _has_input_embeddings(model))
    )
    return modules, {key: value for key, value in with_embeddings.items() if key not in modules}


def _has_input_embeddings(model: PissaModel) -> bool:
    try:
        return hasattr(model, "get_input_embeddings") and model.get_input_embeddings() is not None
    except NotImplementedError:  # by a model of images, which has the method all the same
        return False
