"""An adapter of ours in a folder, as far as it can be read without a model.

adapter_config.json         PEFT's, for a plain LoRA of rank 2r on the unmodified base
adapter_model.safetensors   PEFT's: lora_A = [A ; dA], lora_B = [dB | B0]
pissa.json                  the PissaConfig, and a record of each layer: its base's fingerprint; under a checksum
pissa.safetensors           of each layer:
    a0                      B0, dA and dB are in PEFT's file
    base.a0, base.b0        the start factors of a stored base, if they are not the adapter's own
    base.taken_a, base.taken_b    the factors that its residual lacks, if alternations have found others than these
    norm                    with DoRA, the norms of the base's rows
    base.<part>             the residual of an output layer that is stored and saved, or of a layer whose codes were
                            found by error feedback, which its weight alone does not determine
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from pissa import ops
from pissa.adapters.peft_layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, magnitude_key
from pissa.base.digest import xxh3_of_text
from pissa.base.init_methods import INIT_METHODS
from pissa.base.start import Deltas, Origin, StartFactors
from pissa.base.stored import Expected, residual_from, residual_shapes, residual_tensors
from pissa.config import Form, PissaConfig, default_of
from pissa.containers.checkpoint import PISSA_RECORD
from pissa.containers.hub import adapter_folder
from pissa.containers.messages import read_object, reading, shown
from pissa.containers.tensor_file import TensorFile
from pissa.layers.layer import PissaLayer
from pissa.ops import QuantizedWeight
from pissa.ops.low_rank import split_difference

PISSA_WEIGHTS = "pissa.safetensors"
CONFIG_FILES = (ADAPTER_CONFIG, PISSA_RECORD)
ADAPTER_FILES = (*CONFIG_FILES, ADAPTER_WEIGHTS, PISSA_WEIGHTS)

FORMAT = 1
"""The format of pissa.json that is written and read."""

TAKEN = ("base.taken_a", "base.taken_b")

SAVED = "It is not as save_pretrained wrote it: save the adapter again, or take the file from a copy"
"""The advice for a file of ours that cannot be read."""


# -- pissa.json


_RETIRED = {"orth_reg_weight"}
"""Fields that earlier files have, and that had no effect by themselves."""


def _config_fields() -> list[dataclasses.Field[Any]]:
    """The fields of a configuration, without `runtime_config`, which belongs to one process."""
    return [f for f in dataclasses.fields(PissaConfig) if f.init and f.name != "runtime_config"]


def config_as_json(config: PissaConfig) -> dict[str, Any]:
    """Our own fields, and those fields of LoraConfig that differ from PEFT's defaults, as another PEFT has other
    fields."""
    peft = {f.name: f for f in dataclasses.fields(LoraConfig)}
    fields = {}
    for f in _config_fields():
        value = getattr(config, f.name)
        if f is not peft.get(f.name) or value != default_of(f):  # `is`: lora_alpha is ours, with its default
            fields[f.name] = sorted(value) if isinstance(value, set) else value
    return fields


def config_from_json(fields: dict[str, Any]) -> PissaConfig:
    """The inverse of `config_as_json`."""
    known = {f.name for f in _config_fields()}
    for name, value in fields.items():
        if name not in known | _RETIRED and not (value is None or value is False or value in ("", [], {})):
            raise ValueError(
                f"config has an unknown field {shown(name)}, with the value {shown(value)}: a later version of pissa "
                "or peft may know it"
            )
    return PissaConfig(**{name: value for name, value in fields.items() if name in known})


@dataclass(frozen=True)
class LayerRecord:
    """The record of one layer: the adapter's rank and scaling, and the base to which it belongs."""

    r: int
    scaling: float
    weight: str
    """The fingerprint of the base's dense weight."""
    form: Form
    stored: str | None = None
    """The fingerprint of the stored residual."""
    base: Origin | None = None
    """The origin of a stored base's start factors, if it differs from the adapter's."""
    taken: int | None = None
    """The rank of the factors that the stored residual lacks, if these are not the base's start factors and not empty.
    Only alternations have such factors."""
    start: str | None = None
    """The fingerprint of the start factors a0 and b0, and of the taken factors if there are any, where `pissa init` has
    written them. The files of a saved adapter have checksums instead."""

    @staticmethod
    def of(layer: PissaLayer, adapter_name: str, gathered: Tensor | None = None) -> LayerRecord:
        """The record of a layer in its current state. `gathered`: see `ResidualFingerprint.of`."""
        base, start = layer.base, layer.start_of(adapter_name)
        return LayerRecord(
            start.origin.r,
            start.origin.scaling,
            layer.weight_fingerprint.of(base, gathered),
            base.form,
            stored=None if base.start is None else layer.residual_fingerprint.of(base, gathered),
            base=None if base.start in (None, start) else base.start.origin,
            taken=None if base.start is None else base.start.rank_taken or None,
        )

    def starts(
        self, name: str, a0: Tensor, b0: Tensor, config: PissaConfig, file: TensorFile | None
    ) -> tuple[StartFactors, StartFactors]:
        """Returns the start of an adapter with that configuration in the named layer, whose factors are given, and the
        start that the layer's stored base lacks. Both are the same unless the record says otherwise. The file contains
        all other factors."""
        identity = INIT_METHODS[config.init].identity(config)
        origin = Origin(self.r, self.scaling, config.init, identity)
        taken = (a0[:0], b0[:, :0]) if INIT_METHODS[(self.base or origin).init].takes_nothing else None
        if self.taken is not None and file is not None:
            taken = file.read(f"{name}.{TAKEN[0]}"), file.read(f"{name}.{TAKEN[1]}")
        if self.base is None or file is None:
            start = StartFactors(a0, b0, origin, taken)
            return start, start
        base = StartFactors(file.read(f"{name}.base.a0"), file.read(f"{name}.base.b0"), self.base, taken)
        return StartFactors(a0, b0, origin), base

    def as_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        base = None
        if self.base is not None:
            base = {name: getattr(self.base, name) for name in _ORIGIN} | dict(self.base.identity)
        return dataclasses.asdict(self) | {"form": dict(zip(_FORM, self.form, strict=True)), "base": base}

    @staticmethod
    def from_json(record: dict[str, Any]) -> LayerRecord:
        """The inverse of `as_json`."""
        form, base, fields = Form(*(record["form"][name] for name in _FORM)), None, record["base"]
        if fields is not None:
            names = INIT_METHODS[fields["init"]].identity_fields("quant_iters" in fields)
            names += ("error_feedback",) if "error_feedback" in fields else ()
            identity = tuple((name, fields[name]) for name in names)
            base = Origin(**{name: fields[name] for name in _ORIGIN}, identity=identity)
        return LayerRecord(**record | {"form": form, "base": base})


_FORM = ("residual", "blocksize", "double_quant")
"""The names of a Form's fields in the file."""
_ORIGIN = ("r", "scaling", "init")


@dataclass(frozen=True)
class AdapterRecord:
    """The record of one adapter: its configuration, and its layers by their names in the base model."""

    config: PissaConfig
    layers: dict[str, LayerRecord]

    def text(self) -> str:
        """The content of the file."""
        record = {
            "format": FORMAT,
            "pissa_version": ops.build_info()["version"],
            "config": config_as_json(self.config),
            "layers": {name: layer.as_json() for name, layer in self.layers.items()},
        }
        return json.dumps(record | {"xxh3": checksum(record)}, indent=2, sort_keys=True) + "\n"

    @staticmethod
    def read(path: Path) -> AdapterRecord:
        """Reads the file."""
        with reading(path, SAVED):
            fields = read_object(path)
            if fields["format"] != FORMAT:
                raise ValueError(
                    f"format {shown(fields['format'])} of pissa {fields.get('pissa_version')!r} is not {FORMAT}, which "
                    f"pissa {ops.build_info()['version']} reads"
                )
            if fields.pop("xxh3") != checksum(fields):
                raise ValueError("xxh3 is not the checksum of the other fields: one of them has been changed")
            config = config_from_json(fields["config"])
            return AdapterRecord(config, {name: LayerRecord.from_json(one) for name, one in fields["layers"].items()})


def checksum(record: Mapping[str, Any]) -> str:
    """XXH3-128 of the fields of pissa.json except the checksum itself."""
    return xxh3_of_text(json.dumps(record, sort_keys=True))


# -- pissa.safetensors


def start_tensors(name: str, layer: PissaLayer, adapter_name: str, config: PissaConfig) -> dict[str, Tensor]:
    """The tensors of the named layer of the (unwrapped) model, without its residual."""
    start, kept = layer.start_of(adapter_name), layer.base.start
    parts = {"a0": start.a0}
    if kept is not None and kept is not start:
        parts |= {"base.a0": kept.a0, "base.b0": kept.b0}
    if kept is not None and kept.rank_taken:
        parts |= zip(TAKEN, kept.taken, strict=True)
    if config.use_dora:
        parts["norm"] = layer.magnitude(adapter_name).base_lengths
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def stored_tensors(name: str, residual: Tensor | QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a layer's residual."""
    return {f"{name}.base.{part}": tensor for part, tensor in residual_tensors(residual).items()}


# -- the folder


@dataclass(frozen=True)
class LayerTensors:
    """The tensors of one layer, float32, as they were in memory."""

    start: StartFactors
    deltas: Deltas
    base: StartFactors
    """The start that a stored base lacks: the adapter's own, unless the record says otherwise."""
    magnitude: tuple[Tensor, Tensor] | None
    """With DoRA, the trained lengths and the norms of the base's rows."""


@dataclass(frozen=True)
class PissaFolder:
    """An adapter of ours: its record, and the headers of its tensors."""

    path: Path
    config: PissaConfig
    records: dict[str, LayerRecord]
    """The records by the layer's name in the (unwrapped) model."""
    weights: TensorFile
    starts: TensorFile

    @staticmethod
    def read(path: Path, config: PissaConfig | None = None) -> PissaFolder:
        """Reads the folder that `save_pretrained` wrote for one adapter. A user's `config` replaces the saved one."""
        path = path.absolute()  # `blamed` looks for it in messages, where "q" is also a part of "q_proj"
        record = _read_record(path)
        if config is not None:
            _check_alike(config, record.config, path)
        weights, starts = TensorFile(path / ADAPTER_WEIGHTS), TensorFile(path / PISSA_WEIGHTS)
        return PissaFolder(path, config or record.config, record.layers, weights, starts)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Adds the folder's name to errors of PEFT or our layers in the block, which puts the folder's adapter on a
        model."""
        try:
            yield
        except (ValueError, TypeError, AttributeError, LookupError, NotImplementedError, re.error) as error:
            if str(self.path) in str(error):
                raise
            record = self.path / PISSA_RECORD
            raise ValueError(f"the adapter that {record} describes cannot be put on this model: {error}") from error

    def read_layer(self, name: str, a: Tensor, b: Tensor) -> LayerTensors:
        """Reads the tensors of a layer, given its factors in PEFT's file, a = [A ; dA] and b = [dB | B0]."""
        record, read = self.records[name], self.starts.read
        a0 = read(f"{name}.a0")
        upper, *rest = split_difference(a, b)
        da, db, b0 = (part.contiguous() for part in rest)
        if not torch.equal(upper, a0 + da):
            raise ValueError(
                f"{self.weights.path} and {self.starts.path} do not belong together, or one is damaged: the tensor "
                f"lora_A of layer {name} does not start with a0 + dA"
            )
        start, base = record.starts(name, a0, b0, self.config, self.starts)
        magnitude = (self.weights.read(magnitude_key(name)), read(f"{name}.norm")) if self.config.use_dora else None
        return LayerTensors(start, Deltas(da, db), base, magnitude)

    def start_shapes(self, name: str, matrix_shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that `start_tensors` has written for a layer, all float32."""
        record, (rows, columns) = self.records[name], matrix_shape
        parts: dict[str, tuple[int, ...]] = {"a0": (record.r, columns)}
        if record.base is not None:
            parts |= {"base.a0": (record.base.r, columns), "base.b0": (rows, record.base.r)}
        if record.taken is not None:
            parts |= zip(TAKEN, ((record.taken, columns), (rows, record.taken)), strict=True)
        if self.config.use_dora:
            parts["norm"] = (rows,)
        return {f"{name}.{part}": shape for part, shape in parts.items()}

    def stored_shapes(self, name: str, matrix_shape: tuple[int, int]) -> dict[str, Expected]:
        """The shapes and dtypes of the tensors that `stored_tensors` has written for a layer, if any."""
        record = self.records[name]
        shapes = {f"{name}.base.{part}": needed for part, needed in residual_shapes(record.form, matrix_shape).items()}
        return shapes if record.stored and shapes.keys() & self.starts.entries.keys() else {}

    def is_fed_back(self, name: str) -> bool:
        """Whether error feedback found the codes of a layer's residual, so that they do not follow from its weight."""
        base = self.records[name].base
        return self.config.error_feedback if base is None else base.error_feedback

    def check_codes(self, name: str) -> None:
        """Raises ValueError if the folder lacks the residual of a layer and it cannot be computed from the weight."""
        if self.is_fed_back(name):
            raise ValueError(
                f"the codes of layer {name} were found by error feedback, and {self.path} does not have them: they are "
                "in the checkpoint that pissa init wrote. Give that as the base, to pissa.load or to the command"
            )

    def read_stored(
        self, name: str, matrix_shape: tuple[int, int], device: torch.device
    ) -> Tensor | QuantizedWeight | None:
        """The residual of a layer, on a device; None if the file contains none."""
        keys = self.stored_shapes(name, matrix_shape)
        parts = {key.rpartition(".")[2]: self.starts.read(key).to(device) for key in keys}
        return residual_from(parts, self.records[name].form, matrix_shape) if parts else None


def read_config(model_id: str | os.PathLike[str], *, subfolder: str | None = None, **kwargs: Any) -> PissaConfig:
    """The configuration of an adapter, or the one that `PissaConfig.save_pretrained` wrote, from a folder or a
    repository on the Hub; see `PissaConfig.from_pretrained`."""
    folder = adapter_folder(model_id, CONFIG_FILES, subfolder=subfolder, **kwargs)
    alone = folder / ADAPTER_CONFIG
    if not os.path.isfile(folder / PISSA_RECORD) and os.path.isfile(alone):
        with reading(alone, SAVED):
            fields = read_object(alone)
            if {"svd", "svd_passes"} <= fields.keys():  # otherwise it contains another configuration
                return config_from_json(fields)
    return _read_record(folder).config


PissaConfig.reader = staticmethod(read_config)


def _read_record(folder: Path) -> AdapterRecord:
    if not os.path.isfile(folder / PISSA_RECORD):  # Path.is_file fails if a name is too long
        if os.path.isfile(folder / ADAPTER_CONFIG):
            raise ValueError(
                f"{folder} holds a plain PEFT adapter (no {PISSA_RECORD}): use peft.PeftModel.from_pretrained, or "
                "peft.PeftConfig.from_pretrained for its configuration"
            )
        raise ValueError(f"{folder} holds no PiSSA adapter: there is no {PISSA_RECORD}")
    return AdapterRecord.read(folder / PISSA_RECORD)


def _check_alike(config: PissaConfig, saved: PissaConfig, folder: Path) -> None:
    """Checks that the user's configuration describes the adapter in the folder. Layers, ranks, scalings and tensors are
    compared later, with those of the model."""
    if not isinstance(config, PissaConfig):
        raise TypeError(
            f"config must be a pissa.PissaConfig, got {type(config).__name__}: pissa.PissaConfig.from_pretrained reads "
            "the one in the folder"
        )
    of_start = ("init", "repair", "repair_rank", "start_norm", "svd", "svd_passes", "seed", "quant_iters")
    for name in (*of_start, "form", "use_dora"):
        given, needed = getattr(config, name), getattr(saved, name)
        if given != needed:
            raise ValueError(
                f"config: {name} is {given!r}, the adapter in {folder} was saved with {needed!r}: leave config out, or "
                "change the one that pissa.PissaConfig.from_pretrained reads there"
            )
