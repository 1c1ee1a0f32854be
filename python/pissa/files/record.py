"""pissa.json: what it says of an adapter and of each of its layers, every field checked before it is used."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from peft import LoraConfig
from torch import Tensor

import pissa
from pissa.base.stored import Origin, StoredLinear
from pissa.config import IMPLICIT, Form, Init, PissaConfig, default_of
from pissa.files.json_file import read_json, shown
from pissa.layers.layer import PissaLayer
from pissa.ops.checks import check_choice, check_scaling, check_svd
from pissa.ops.formats import FORMATS

FORMAT = 2
"""What is written. Format 1, whose fingerprints are SHA-256, is read too."""

# Bytes: what safetensors allows a header. 100,000 layers take half of it.
_SIZE_LIMIT = 100_000_000

_ONCE_WRITTEN = (("megatron_core", "megatron.core"), ("qalora_group_size", 16))
"""pissa 0.1.0 wrote all fields of PEFT 0.21: these, too, which it has no use for, at defaults that are not empty."""


class _SavedForm(NamedTuple):
    """A Form under the names that the file has for its fields."""

    residual: str
    blocksize: int | None
    double_quant: bool | None


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """What pissa.json says of one layer: the adapter's rank and scaling, and the base that it belongs to.

    Raises:
        ValueError: naming the field, what was given and what is allowed.
    """

    r: int
    scaling: float
    weight: str
    """Fingerprint of the base's dense weight."""
    form: Form
    stored: str | None = None
    """Fingerprint of the stored residual."""
    base: Origin | None = None
    """Origin of the start factors of a stored base, where they are not the adapter's."""

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        check_scaling(self.scaling)
        _check_fingerprint("weight", self.weight)
        _check_form(self.form)
        if (self.stored is None) != (self.form == IMPLICIT):
            raise ValueError(f"stored: got {self.stored!r}; needed: a fingerprint where form is not implicit")
        if self.stored is not None:
            _check_fingerprint("stored", self.stored)
        if self.base is not None:
            if self.stored is None:
                raise ValueError("base: got an origin; needed: null where form is implicit")
            _check_rank("base.r", self.base.r)
            check_scaling(self.base.scaling, "base.scaling")
            check_svd(self.base.svd, self.base.svd_passes, self.base.seed)
            if self.base.init not in get_args(Init):
                raise ValueError(f"base.init: got {shown(self.base.init)}; allowed: {', '.join(get_args(Init))}")

    @staticmethod
    def of(layer: PissaLayer, adapter_name: str, gathered: Tensor | None = None) -> LayerRecord:
        """What is to be written of a layer. `gathered`: see `PissaLayer.base_fingerprint`."""
        base, start = layer.unmerged_base, layer.start_of(adapter_name)
        record = LayerRecord(start.origin.r, start.origin.scaling, layer.base_fingerprint(gathered), IMPLICIT)
        if not isinstance(base, StoredLinear):
            return record
        return dataclasses.replace(
            record,
            form=layer.form,
            stored=layer.residual_fingerprint(gathered),
            base=None if base.start is start else base.start.origin,
        )

    def as_json(self) -> dict[str, Any]:
        record = dataclasses.asdict(self) | {"form": _SavedForm(*self.form)._asdict()}
        return record | {"base": None if self.base is None else self.base._asdict()}


@dataclasses.dataclass(frozen=True)
class AdapterRecord:
    """What pissa.json says of one adapter: its configuration, and its layers by their name in the base model."""

    config: PissaConfig
    layers: dict[str, LayerRecord]

    def text(self) -> str:
        """The content of the file."""
        record = {
            "format": FORMAT,
            "pissa_version": pissa.__version__,
            "config": _config_as_json(self.config),
            "layers": {name: layer.as_json() for name, layer in self.layers.items()},
        }
        return json.dumps(record | {"sha256": checksum(record)}, indent=2, sort_keys=True) + "\n"

    @staticmethod
    def read(path: Path) -> AdapterRecord:
        """Reads the file.

        Raises:
            ValueError: naming the file and the field, what was found and what is allowed.
        """
        with _naming(path):
            return AdapterRecord._parse(read_json(path, _SIZE_LIMIT))

    @staticmethod
    def _parse(record: Any) -> AdapterRecord:
        fields = _typed(record, dict[str, Any], "the content")
        for name in ("format", "config", "layers", "sha256"):
            if name not in fields:
                raise ValueError(f"{name!r} is missing")
        if not 1 <= _typed(fields["format"], int, "format") <= FORMAT:
            raise ValueError(
                f"format {fields['format']} of pissa {fields.get('pissa_version')!r} is none of 1 to {FORMAT}, which "
                f"pissa {pissa.__version__} reads"
            )
        config = _config_from_json(_typed(fields["config"], dict[str, Any], "config"))
        layers = {}
        for name, layer in _typed(fields["layers"], dict[str, Any], "layers").items():
            try:
                layers[name] = _typed(layer, LayerRecord, "the record")
                # Implicit: the layer's weight is tied to another module's.
                if IMPLICIT not in (config.form, layers[name].form) and config.form != layers[name].form:
                    raise ValueError(f"form: got {layers[name].form.describe()}; config has {config.form.describe()}")
            except ValueError as error:
                raise ValueError(f"layer {shown(name)}: {error}") from error
        if fields.pop("sha256") != checksum(fields):
            raise ValueError("sha256 is not the checksum of the other fields: one of them has been changed")
        return AdapterRecord(config, layers)


def read_config_alone(path: Path) -> PissaConfig | None:
    """The configuration in PEFT's adapter_config.json, as `PissaConfig.save_pretrained` wrote it; None where another
    configuration is.

    Raises:
        ValueError: naming the file and the field, what was found and what is allowed.
    """
    with _naming(path):
        fields = _typed(read_json(path, _SIZE_LIMIT), dict[str, Any], "the content")
        return _config_from_json(fields) if {"svd", "svd_passes"} <= fields.keys() else None


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names the file in what the block says of its content."""
    try:
        yield
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}. It is not as save_pretrained wrote it: save the adapter again, "
            "or take the file from a copy"
        ) from error


def checksum(record: Mapping[str, Any]) -> str:
    """SHA-256 of what pissa.json says besides its checksum."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _typed(value: Any, kind: Any, where: str) -> Any:
    """`value`, which json has read, as `kind`: a type of JSON's, a Union, Literal, list or dict of such, or a record
    (dataclass or NamedTuple), of which every field has to be there."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and type(None) in args:
            return None
        alternatives = [alternative for alternative in args if alternative is not type(None)]
        if len(alternatives) == 1:
            return _typed(value, alternatives[0], where)
        for alternative in alternatives:
            try:
                return _typed(value, alternative, where)
            except ValueError:
                continue
    elif origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
    elif origin is list:
        if isinstance(value, list):
            return [_typed(item, args[0], f"{where}[{index}]") for index, item in enumerate(value)]
    elif origin is dict:
        if isinstance(value, dict):
            return {key: _typed(item, args[1], f"{where}[{shown(key)}]") for key, item in value.items()}
    elif kind is Form:
        return Form(*_typed(value, _SavedForm, where))
    elif hasattr(kind, "_fields") or dataclasses.is_dataclass(kind):
        if isinstance(value, dict):
            return kind(**_fields(value, get_type_hints(kind), where))
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            return value
    elif kind is Any or (isinstance(value, kind) and isinstance(value, bool) == (kind is bool)):
        return value
    wanted = kind.__name__ if isinstance(kind, type) and not args else kind
    raise ValueError(f"{where}: got {shown(value)}; needed: {wanted}")


def _fields(value: dict[str, Any], hints: Mapping[str, Any], where: str) -> dict[str, Any]:
    for name in [*value, *hints]:
        if name not in hints:
            raise ValueError(f"{where} has an unknown field {shown(name)}; known: {', '.join(hints)}")
        if name not in value:
            raise ValueError(f"{where} has no field {name!r}")
    return {name: _typed(value[name], hint, name) for name, hint in hints.items()}


def _config_as_json(config: PissaConfig) -> dict[str, Any]:
    """Its own fields, and of LoraConfig's those that differ from PEFT's defaults: another PEFT has other fields."""
    peft = {f.name: f for f in dataclasses.fields(LoraConfig)}
    fields = {}
    for f in _config_fields():
        value = getattr(config, f.name)
        if f is not peft.get(f.name) or value != default_of(f):  # `is`: lora_alpha is ours, with its default
            fields[f.name] = sorted(value) if isinstance(value, set) else value
    return fields


def _config_from_json(fields: dict[str, Any]) -> PissaConfig:
    hints = get_type_hints(PissaConfig)
    known = {f.name: f for f in _config_fields()}
    given = {}
    for name, value in fields.items():
        if name not in known:
            if value is None or value is False or value in ("", [], {}) or (name, value) in _ONCE_WRITTEN:
                continue
            raise ValueError(
                f"config has an unknown field {shown(name)}, with the value {shown(value)}: a later version of pissa "
                "or peft may know it"
            )
        default = default_of(known[name])
        if not (type(value) is type(default) and value == default):  # PEFT's hints leave some of its own defaults out
            _typed(value, hints[name], f"config.{name}")
        given[name] = value
    if given.get("quant") is not None:
        given.pop("residual", None)  # pissa 0.1.0 wrote it beside quant, where it had no effect
    return PissaConfig(**given)


def _config_fields() -> list[dataclasses.Field[Any]]:
    """What a configuration is made of; `runtime_config` is of one process."""
    return [f for f in dataclasses.fields(PissaConfig) if f.init and f.name != "runtime_config"]


def _check_rank(name: str, r: int) -> None:
    if r < 1:
        raise ValueError(f"{name}: got {r}; allowed: 1 or more")


def _check_fingerprint(name: str, value: str) -> None:
    if not re.fullmatch("xxh3:[0-9a-f]{32}|[0-9a-f]{64}", value):
        raise ValueError(f'{name}: got {shown(value)}; needed: "xxh3:" and 32 hexadecimal digits, or 64 (SHA-256)')


def _check_form(form: Form) -> None:
    check_choice("residual", form.kind, ("implicit", "explicit", "nf4"))
    if form.kind == "nf4":
        if form.blocksize is None or form.double_quant is None:
            raise ValueError("form: got no blocksize or double_quant; needed: both with nf4")
        FORMATS[form.kind].check_options(form.blocksize, form.double_quant)
    elif form.blocksize is not None or form.double_quant is not None:
        raise ValueError(f"form: got {form.describe()}; needed: blocksize and double_quant with nf4 only")
