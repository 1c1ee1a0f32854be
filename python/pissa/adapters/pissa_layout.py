"""An adapter of ours in a folder, as far as it can be read without a model.

pissa.safetensors           the adapter. In its metadata, the record: the PissaConfig; for each layer the fingerprint of
                            its base, and fingerprints of the rest of the base; the digest of pissa_codes.safetensors;
                            under a checksum. Of each layer, under its name in the model:
    delta_a, delta_b        the trained differences dA and dB
    a0, b0                  the start factors. b0 is left out if it is zero, as for LoRA's start
    base.a0, base.b0        the start factors of a stored base, if they are not the adapter's own
    recipe.a, recipe.b      the factors that its residual lacks, if alternations have found others than these
    norm, magnitude         with DoRA, the norms of the base's rows and the trained lengths
                            and, under PEFT's names, what is trained or saved beside the layers
pissa.json                  a copy of the record, for people and for whoever needs nothing but the configuration. `pissa
                            init` writes one for a model's folder, where it is the only one
pissa_codes.safetensors     of each layer whose residual its weight alone does not determine, that residual: codes that
                            error feedback has found, and an output layer that is stored and saved. They never change
                            in a run, so the folders of a run share one file (hard links)
adapter_model.safetensors,  PEFT's: an export, the plain LoRA for the unmodified base. lora_A = [A ; dA] and
adapter_config.json         lora_B = [dB | B0], of rank 2r; or, if all B0 are zero, A and dB, of rank r

The metadata of adapter_model.safetensors name pissa.safetensors by its digest. If another program writes
adapter_model.safetensors again, it does not write that, and the folder is its plain LoRA.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from pissa import ops
from pissa.adapters.peft_layout import ADAPTER_WEIGHTS, PREFIX, magnitude_key
from pissa.base.digest import xxh3_of_text
from pissa.base.init_methods import INIT_METHODS
from pissa.base.start import Deltas, Origin, StartFactors, Starts
from pissa.base.stored import Expected, residual_from, residual_shapes
from pissa.config import IMPLICIT, Form, PissaConfig, default_of
from pissa.containers.checkpoint import PISSA_RECORD
from pissa.containers.hub import adapter_folder
from pissa.containers.messages import file_errors, quote, read_object
from pissa.containers.recognise import ADAPTER_CONFIG
from pissa.containers.tensor_file import TensorFile
from pissa.layers.layer import PissaLayer
from pissa.ops import QuantizedWeight

PISSA_WEIGHTS = "pissa.safetensors"
PISSA_CODES = "pissa_codes.safetensors"
CONFIG_FILES = (ADAPTER_CONFIG, PISSA_RECORD)
ADAPTER_FILES = (*CONFIG_FILES, ADAPTER_WEIGHTS, PISSA_WEIGHTS, PISSA_CODES)

FORMAT = 2
"""The format of the record that is written and read."""

MARK = "pissa"
"""The entry in a file's metadata: in pissa.safetensors the record, in the plain LoRA the digest of that file."""

RECIPE = ("recipe.a", "recipe.b")

SAVED = "It is not as save_pretrained wrote it: save the adapter again, or take the file from a copy [P058]"
"""The advice for a file of ours that cannot be read."""


# -- the record


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


_FORMER_FIELDS = {"start_norm": "singular", "svd": "krylov", "svd_passes": "auto", "blocksize": 64}
"""Fields that earlier versions had, with the values that mean what every configuration means now."""

_FORMER_VALUES = {"quant": ("nf3", "nf2"), "name": ("nf3", "nf2"), "init": ("loftq",), "repair": ("loftq",)}
"""Values that earlier versions had."""


def _without_former(fields: dict[str, Any]) -> dict[str, Any]:
    """A configuration, form or start in a record, without the fields that only earlier versions had. Raises ValueError
    if it is one that only an earlier version supported."""
    for name, value in fields.items():
        if value in _FORMER_VALUES.get(name, ()) or value not in (None, _FORMER_FIELDS.get(name, value)):
            raise ValueError(
                f"{name} is {quote(value)}, which only earlier versions of pissa support: make the folder again with "
                "this one. peft.PeftModel.from_pretrained still reads the plain LoRA of an adapter [P059]"
            )
    return {name: value for name, value in fields.items() if name not in _FORMER_FIELDS}


def config_from_json(fields: dict[str, Any]) -> PissaConfig:
    """The inverse of `config_as_json`."""
    known, fields = {f.name for f in _config_fields()}, _without_former(fields)
    for name, value in fields.items():
        if name not in known and not (value is False or value in (None, "", [], {})):
            raise ValueError(
                f"config has an unknown field {quote(name)}, with the value {quote(value)}: another version of pissa "
                "or peft may know it [P059]"
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
    has_b0: bool = True
    """Whether B0 is not zero. Only then does the file contain it, and the plain LoRA needs rank 2r."""
    stored: str | None = None
    """The fingerprint of the stored residual."""
    base: Origin | None = None
    """The origin of a stored base's start factors, if it differs from the adapter's."""
    recipe: int | None = None
    """The rank of the factors that the stored residual lacks, if these are not the base's start factors and not empty.
    Only alternations have such factors."""
    start: str | None = None
    """The fingerprint of the start factors a0 and b0, and of the recipe's factors if there are any, where `pissa init`
    has written them. The files of a saved adapter have checksums instead."""

    @staticmethod
    def of(layer: PissaLayer, adapter_name: str, gathered: Tensor | None = None) -> LayerRecord:
        """The record of a layer in its current state. `gathered`: see `ResidualFingerprint.of`."""
        base, start = layer.base, layer.start_of(adapter_name)
        return LayerRecord(
            start.origin.r,
            start.origin.scaling,
            layer.weight_fingerprint.of(base, gathered),
            base.form,
            has_b0=not start.changes_nothing,
            stored=None if base.start is None else layer.residual_fingerprint.of(base, gathered),
            base=None if base.start in (None, start) else base.start.origin,
            recipe=None if base.start is None else base.start.recipe_rank or None,
        )

    def starts(self, name: str, a0: Tensor, b0: Tensor, config: PissaConfig, read: Callable[[str], Tensor]) -> Starts:
        """Returns the start of an adapter with that configuration in the named layer, whose factors are given, and the
        start that the layer's stored base lacks: the same unless the record says otherwise. All other factors are
        read."""
        origin = Origin(self.r, self.scaling, config.init, INIT_METHODS[config.init].identity(config))
        recipe = None
        if self.recipe is not None:
            recipe = read(f"{name}.{RECIPE[0]}"), read(f"{name}.{RECIPE[1]}")
        elif INIT_METHODS[(self.base or origin).init].repairs:
            recipe = a0[:0], b0[:, :0]
        if self.base is None:
            start = StartFactors(a0, b0, origin, recipe)
            return Starts(start, self.scaling, None if self.form == IMPLICIT else start)
        base = StartFactors(read(f"{name}.base.a0"), read(f"{name}.base.b0"), self.base, recipe)
        return Starts(StartFactors(a0, b0, origin), self.scaling, base)

    def shapes(self, matrix_shape: tuple[int, int], *, dora: bool) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that `layer_tensors` has written for the layer, by their names after the layer's.
        All are float32."""
        (rows, columns), r = matrix_shape, self.r
        shapes: dict[str, tuple[int, ...]] = {"delta_a": (r, columns), "delta_b": (rows, r), "a0": (r, columns)}
        if self.has_b0:
            shapes["b0"] = rows, r
        if self.base is not None:
            shapes |= {"base.a0": (self.base.r, columns), "base.b0": (rows, self.base.r)}
        if self.recipe is not None:
            shapes |= zip(RECIPE, ((self.recipe, columns), (rows, self.recipe)), strict=True)
        return shapes | ({"norm": (rows,), "magnitude": (rows,)} if dora else {})

    def as_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        base = None
        if self.base is not None:
            base = self.base._asdict() | dict(self.base.identity)
            del base["identity"]
        return dataclasses.asdict(self) | {"form": self.form._asdict(), "base": base}

    @staticmethod
    def from_json(record: dict[str, Any]) -> LayerRecord:
        """The inverse of `as_json`."""
        base = None
        if record["base"] is not None:
            identity = _without_former(record["base"])
            r, scaling, init = (identity.pop(name) for name in ("r", "scaling", "init"))
            base = Origin(r, scaling, INIT_METHODS[init].name, tuple(sorted(identity.items())))
        return LayerRecord(**record | {"form": Form(**_without_former(record["form"])), "base": base})


@dataclass(frozen=True)
class AdapterRecord:
    """The record of one adapter: its configuration, and its layers by their names in the base model."""

    config: PissaConfig
    layers: dict[str, LayerRecord]
    rest: dict[str, str] = field(default_factory=dict)
    """The fingerprints of the base's other tensors; see `rest.of_model`."""
    codes: str | None = None
    """The digest of the file with codes, if the adapter needs one."""

    def text(self) -> str:
        """The text of the record."""
        record = {
            "format": FORMAT,
            "pissa_version": ops.build_info()["version"],
            "config": config_as_json(self.config),
            "layers": {name: layer.as_json() for name, layer in self.layers.items()},
            "rest": self.rest,
            "codes": self.codes,
        }
        return json.dumps(record | {"xxh3": checksum(record)}, indent=2, sort_keys=True) + "\n"

    @staticmethod
    def read(path: Path) -> AdapterRecord:
        """Reads a file pissa.json."""
        with file_errors(path, SAVED):
            return AdapterRecord.from_json(read_object(path))

    @staticmethod
    def from_json(fields: dict[str, Any]) -> AdapterRecord:
        """The inverse of `text`, for the object in it. To be called in a block of `file_errors`."""
        if (format := fields["format"]) != FORMAT:
            raise ValueError(
                f"format {quote(format)} of pissa {fields.get('pissa_version')!r} is not {FORMAT}, which pissa "
                f"{ops.build_info()['version']} reads; peft.PeftModel.from_pretrained reads the plain LoRA [P059]"
            )
        if fields.pop("xxh3") != checksum(fields):
            raise ValueError("xxh3 is not the checksum of the other fields: one of them has been changed")
        config, rest, codes = config_from_json(fields["config"]), dict(fields["rest"]), fields["codes"]
        if not all(isinstance(text, str) for text in (*rest.values(), codes or "")):
            raise ValueError("rest or codes has something else than texts")
        layers = {name: LayerRecord.from_json(record) for name, record in fields["layers"].items()}
        return AdapterRecord(config, layers, rest, codes)


def checksum(record: Mapping[str, Any]) -> str:
    """XXH3-128 of the fields of a record except the checksum itself."""
    return xxh3_of_text(json.dumps(record, sort_keys=True))


# -- pissa.safetensors


def layer_tensors(
    name: str, layer: PissaLayer, adapter_name: str, config: PissaConfig, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of the named layer of the (unwrapped) model, of which `state` is the state dict with PEFT's prefix,
    without its residual."""
    start, kept, prefix = layer.start_of(adapter_name), layer.base.start, f"{PREFIX}{name}."
    parts = dict(zip(("delta_a", "delta_b"), layer.deltas_in(state, prefix, adapter_name), strict=True))
    parts["a0"] = start.a0
    if not start.changes_nothing:
        parts["b0"] = start.b0
    if kept is not None and kept is not start:
        parts |= {"base.a0": kept.a0, "base.b0": kept.b0}
    if kept is not None and kept.recipe_rank:
        parts |= zip(RECIPE, kept.removed, strict=True)
    if config.use_dora:
        magnitude = layer.magnitude(adapter_name)
        trained = state[f"{magnitude_key(name)}.{adapter_name}.weight"].detach()
        parts |= {"norm": magnitude.base_lengths, "magnitude": magnitude.lengths(trained)}
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


# -- the folder


@dataclass(frozen=True, kw_only=True)
class PissaFolder(AdapterRecord):
    """An adapter of ours: its record, and the headers of its tensors."""

    path: Path
    tensors: TensorFile
    codes_file: TensorFile | None

    @staticmethod
    def open(path: Path, config: PissaConfig | None = None) -> PissaFolder:
        """Reads the folder that `save_pretrained` wrote for one adapter. A user's `config` replaces the saved one."""
        path = path.absolute()  # `blame` looks for it in messages, where "q" is also a part of "q_proj"
        if not has_ours(path):
            raise ValueError(_no_adapter(path))
        tensors = TensorFile(path / PISSA_WEIGHTS)
        if MARK not in tensors.metadata:
            raise ValueError(
                f"{tensors.path} has no record: another version or another program has written it. {SAVED}"
            )
        if not is_export_ours(path):
            raise ValueError(
                f"{say_replaced(path)} Load that with peft.PeftModel.from_pretrained; or, for the adapter that pissa "
                f"has saved, delete {ADAPTER_WEIGHTS}, or take it from a copy"
            )
        tensors.expect_checksums()
        with file_errors(tensors.path, SAVED):
            record = AdapterRecord.from_json(json.loads(tensors.metadata[MARK]))
        if config is not None:
            _check_alike(config, record.config, path)
            record = replace(record, config=config)
        codes = None if record.codes is None else TensorFile(path / PISSA_CODES)
        if codes is not None and codes.digest != record.codes:
            raise ValueError(
                f"{codes.path} is not that of {PISSA_WEIGHTS}, because saving was interrupted, or it is from another "
                "folder. Save the adapter again, or take both files from a copy [P058]"
            )
        return PissaFolder(**vars(record), path=path, tensors=tensors, codes_file=codes)

    @contextmanager
    def blame(self) -> Iterator[None]:
        """Adds the folder's name to errors of PEFT or our layers in the block, which puts the folder's adapter on a
        model."""
        try:
            yield
        except (ValueError, TypeError, AttributeError, LookupError, NotImplementedError, re.error) as error:
            if str(self.path) in str(error):
                raise
            raise ValueError(f"the adapter in {self.path} cannot be put on this model: {error}") from error

    def read_starts(self, name: str) -> Starts:
        """Reads the starts in a layer, float32, as they were in memory."""
        record, read = self.layers[name], self.tensors.read
        shape = self.tensors.entries[f"{name}.delta_b"].shape
        b0 = read(f"{name}.b0") if record.has_b0 else torch.zeros(shape, dtype=torch.float32)
        return record.starts(name, read(f"{name}.a0"), b0, self.config, read)

    def read_deltas(self, name: str) -> Deltas:
        """Reads what was trained in a layer."""
        return Deltas(self.tensors.read(f"{name}.delta_a"), self.tensors.read(f"{name}.delta_b"))

    def read_lengths(self, name: str) -> tuple[Tensor, Tensor]:
        """Reads the trained lengths of a layer with DoRA, and the norms of its base's rows."""
        return self.tensors.read(f"{name}.magnitude"), self.tensors.read(f"{name}.norm")

    def stored_shapes(self, name: str, matrix_shape: tuple[int, int]) -> dict[str, Expected]:
        """The shapes and dtypes of the tensors of a layer in the file with codes, if any."""
        shapes = residual_shapes(self.layers[name].form, matrix_shape) if self.layers[name].stored else {}
        expected = {f"{name}.{part}": needed for part, needed in shapes.items()}
        return expected if self.codes_file and expected.keys() & self.codes_file.entries.keys() else {}

    def is_fed_back(self, name: str) -> bool:
        """Whether error feedback found the codes of a layer's residual, so that they do not follow from its weight."""
        base = self.layers[name].base
        return self.config.error_feedback if base is None else base.error_feedback

    def read_stored(
        self, name: str, matrix_shape: tuple[int, int], device: torch.device
    ) -> Tensor | QuantizedWeight | None:
        """The residual of a layer, on a device; None if it is computed from the weight. Raises ValueError if it is
        needed and missing."""
        keys = self.stored_shapes(name, matrix_shape)
        if self.codes_file and keys:
            parts = {key.rpartition(".")[2]: self.codes_file.read(key).to(device) for key in keys}
            return residual_from(parts, self.layers[name].form, matrix_shape)
        if self.is_fed_back(name):
            raise ValueError(
                f"the codes of layer {name} were found by error feedback, and {self.path} does not have them: they are "
                "in the checkpoint that pissa init wrote. Give that as the base, to pissa.load or to the command"
            )
        return None


def has_ours(folder: Path) -> bool:
    """Whether the folder contains an adapter of ours, or a part of one."""
    return any(os.path.lexists(folder / name) for name in (PISSA_RECORD, PISSA_WEIGHTS))


def is_export_ours(folder: Path) -> bool:
    """Whether no other program has written the plain LoRA in a folder of ours. It may also have been deleted."""
    path = folder / ADAPTER_WEIGHTS
    return not os.path.lexists(path) or MARK in TensorFile(path).metadata


def say_replaced(folder: Path) -> str:
    """The beginning of a message about a folder of ours with a plain LoRA from elsewhere."""
    return (
        f"{folder / ADAPTER_WEIGHTS} is not the one that pissa has saved beside {PISSA_WEIGHTS}: another program has "
        "written it, and the folder is now the plain LoRA in it."
    )


def read_config(model_id: str | os.PathLike[str], *, subfolder: str | None = None, **kwargs: Any) -> PissaConfig:
    """The configuration of an adapter, or the one that `PissaConfig.save_pretrained` wrote, from a folder or a
    repository on the Hub; see `PissaConfig.from_pretrained`."""
    folder = adapter_folder(model_id, CONFIG_FILES, subfolder=subfolder, **kwargs)
    record, alone = folder / PISSA_RECORD, folder / ADAPTER_CONFIG
    if os.path.isfile(record):  # Path.is_file fails if a name is too long
        return AdapterRecord.read(record).config
    if os.path.isfile(alone):
        with file_errors(alone, SAVED):
            fields = read_object(alone)
            if {"quant", "quant_iters"} <= fields.keys():  # otherwise it contains another configuration
                return config_from_json(fields)
    raise ValueError(_no_adapter(folder))


PissaConfig.reader = staticmethod(read_config)


def _no_adapter(folder: Path) -> str:
    if os.path.isfile(folder / ADAPTER_CONFIG):
        return (
            f"{folder} holds a plain PEFT adapter (no {PISSA_RECORD}): use peft.PeftModel.from_pretrained, or "
            "peft.PeftConfig.from_pretrained for its configuration [P055]"
        )
    return f"{folder} holds no PiSSA adapter: there is no {PISSA_RECORD} [P055]"


_FREE = {"inference_mode", "lora_dropout", "base_model_name_or_path", "revision", "task_type", "auto_mapping"}
_FREE |= {"peft_version", "fan_in_fan_out", "quant_storage"}
_FREE |= {"target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"}
_FREE |= {"rank_pattern", "alpha_pattern", "modules_to_save"}
"""The fields of a configuration that do not change the function of an adapter, and those that choose layers, modules
and ranks, because these are compared with those of the model."""


def _check_alike(config: PissaConfig, saved: PissaConfig, folder: Path) -> None:
    """Checks that the user's configuration describes the adapter in the folder."""
    if not isinstance(config, PissaConfig):
        raise TypeError(
            f"config must be a pissa.PissaConfig, got {type(config).__name__}: pissa.PissaConfig.from_pretrained reads "
            "the one in the folder [P011]"
        )
    for name in [f.name for f in _config_fields() if f.name not in _FREE]:
        value, needed = getattr(config, name), getattr(saved, name)
        if value != needed:
            raise ValueError(
                f"config: {name} is {value!r}, the adapter in {folder} was saved with {needed!r}: leave config out, or "
                "change that of pissa.PissaConfig.from_pretrained(folder), in inference_mode or lora_dropout [P060]"
            )
