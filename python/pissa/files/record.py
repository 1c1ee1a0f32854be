"""pissa.json: a record of an adapter and of each of its layers. Every field is checked before it is used."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

from pissa import ops
from pissa.base.digest import is_well_formed, xxh3_of_text
from pissa.base.init_methods import INIT_METHODS
from pissa.base.start import Origin
from pissa.config import IMPLICIT, Form, PissaConfig, types_of_fields
from pissa.files.config_json import config_as_json, config_from_json
from pissa.files.json_file import blaming, read_json, typed, typed_fields
from pissa.files.messages import shown
from pissa.layers.layer import PissaLayer
from pissa.ops.checks import check_choice, check_scaling
from pissa.ops.formats import FORMATS

FORMAT = 1
"""The format that is written, and read."""


class _SavedForm(NamedTuple):
    """A Form under the names that the file has for its fields."""

    residual: str
    blocksize: int | None
    double_quant: bool | None


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """The record of one layer: the adapter's rank and scaling, and the base that it belongs to.

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
    """Origin of a stored base's start factors, if they are not the adapter's."""
    taken: int | None = None
    """Rank of the factors that the stored residual lacks, if they are others than the base's start factors, and some.
    Only alternations have such factors."""
    start: str | None = None
    """Fingerprint of the start factors a0 and b0, and of the factors taken, if there are such, where `pissa init` has
    written them: beside an adapter that was saved, the files have checksums."""

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        check_scaling(self.scaling)
        _check_fingerprint("weight", self.weight)
        _check_form(self.form)
        if (self.stored is None) != (self.form == IMPLICIT):
            raise ValueError(f"stored: got {self.stored!r}; needed: a fingerprint unless form is implicit")
        if self.stored is not None:
            _check_fingerprint("stored", self.stored)
        if self.base is not None:
            if self.stored is None:
                raise ValueError("base: got an origin; needed: null if form is implicit")
            _check_rank("base.r", self.base.r)
            check_scaling(self.base.scaling, "base.scaling")
            _check_identity(dict(self.base.identity))
        if self.taken is not None:
            if self.stored is None:
                raise ValueError("taken: got a rank; needed: none if form is implicit")
            _check_rank("taken", self.taken)
        if self.start is not None:
            _check_fingerprint("start", self.start)

    @staticmethod
    def of(layer: PissaLayer, adapter_name: str, gathered: Tensor | None = None) -> LayerRecord:
        """The record of a layer as it is. `gathered`: see `Fingerprints`."""
        base, start, known = layer.base, layer.start_of(adapter_name), layer.fingerprints
        return LayerRecord(
            start.origin.r,
            start.origin.scaling,
            str(known.of_weight(base, gathered)),
            base.form,
            stored=None if base.start is None else str(known.of_residual(base, gathered)),
            base=None if base.start in (None, start) else base.start.origin,
            taken=None if base.start is None else base.start.rank_taken or None,
        )

    def as_json(self) -> dict[str, Any]:
        """The record as an object of JSON."""
        base = None if self.base is None else _origin_as_json(self.base)
        return dataclasses.asdict(self) | {"form": _SavedForm(*self.form)._asdict(), "base": base}

    @staticmethod
    def from_json(record: Any) -> LayerRecord:
        """The way back from `as_json`."""
        hints = get_type_hints(LayerRecord) | {"form": _SavedForm, "base": dict[str, Any] | None}
        fields = typed_fields(typed(record, dict[str, Any], "the record"), hints, "the record")
        base = None if fields["base"] is None else _origin_from_json(fields["base"])
        return LayerRecord(**fields | {"form": Form(*fields["form"]), "base": base})


@dataclasses.dataclass(frozen=True)
class AdapterRecord:
    """The record of one adapter: its configuration, and its layers by their name in the base model."""

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
        """Reads the file.

        Raises:
            ValueError: naming the file and the field, what was found and what is allowed.
        """
        with blaming(path):
            return AdapterRecord._parse(read_json(path))

    @staticmethod
    def _parse(record: Any) -> AdapterRecord:
        fields = typed(record, dict[str, Any], "the content")
        for name in ("format", "config", "layers", "xxh3"):
            if name not in fields:
                raise ValueError(f"{name!r} is missing")
        if typed(fields["format"], int, "format") != FORMAT:
            raise ValueError(
                f"format {fields['format']} of pissa {fields.get('pissa_version')!r} is not {FORMAT}, which pissa "
                f"{ops.build_info()['version']} reads"
            )
        config = config_from_json(typed(fields["config"], dict[str, Any], "config"))
        layers = {}
        for name, layer in typed(fields["layers"], dict[str, Any], "layers").items():
            try:
                layers[name] = LayerRecord.from_json(layer)
                # A layer whose weight is tied to another module's is implicit in any configuration, and fused experts
                # of a checkpoint are explicit in any that is stored.
                allowed = (IMPLICIT, Form("explicit"), config.form)
                if config.form != IMPLICIT and layers[name].form not in allowed:
                    raise ValueError(f"form: got {layers[name].form.describe()}; config has {config.form.describe()}")
            except ValueError as error:
                raise ValueError(f"layer {shown(name)}: {error}") from error
        if fields.pop("xxh3") != checksum(fields):
            raise ValueError("xxh3 is not the checksum of the other fields: one of them has been changed")
        return AdapterRecord(config, layers)


def checksum(record: Mapping[str, Any]) -> str:
    """XXH3-128 of the fields of pissa.json besides its checksum."""
    return xxh3_of_text(json.dumps(record, sort_keys=True))


_ORIGIN = {"r": int, "scaling": float, "init": str, "adalora": bool}


def _origin_as_json(origin: Origin) -> dict[str, Any]:
    return {name: getattr(origin, name) for name in _ORIGIN} | dict(origin.identity)


def _origin_from_json(fields: dict[str, Any]) -> Origin:
    """The way back from `_origin_as_json`."""
    check_choice("base.init", fields.get("init"), tuple(INIT_METHODS))
    names = INIT_METHODS[fields["init"]].identity_fields("quant_iters" in fields)
    hints = types_of_fields(PissaConfig)
    found = typed_fields(fields, _ORIGIN | {name: hints[name] for name in names}, "base")
    return Origin(**{name: found[name] for name in _ORIGIN}, identity=tuple((name, found[name]) for name in names))


def _check_identity(fields: dict[str, Any]) -> None:
    """Raises ValueError, naming the field, if a configuration cannot have these fields."""
    try:
        PissaConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"base.{error}") from None


def _check_rank(name: str, r: int) -> None:
    if r < 1:
        raise ValueError(f"{name}: got {r}; allowed: 1 or more")


def _check_fingerprint(name: str, value: str) -> None:
    if not is_well_formed(value):
        raise ValueError(
            f'{name}: got {shown(value)}; needed: "xxh3" or "sums", a dtype and 32 hexadecimal digits, with colons '
            "between"
        )


def _check_form(form: Form) -> None:
    check_choice("residual", form.kind, ("implicit", "explicit", *FORMATS))
    if form.kind not in FORMATS:
        if form.blocksize is not None or form.double_quant is not None:
            raise ValueError(f"form: got {form.describe()}; needed: blocksize and double_quant with a format only")
        return
    if FORMATS[form.kind].blocksizes and (form.blocksize is None or form.double_quant is None):
        raise ValueError(f"form: got no blocksize or double_quant; needed: both with {form.kind}")
    FORMATS[form.kind].check_options(form.blocksize, form.double_quant)
