"""pissa.json: a record of an adapter and of each of its layers, under a checksum."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pissa import ops
from pissa.base.digest import xxh3_of_text
from pissa.base.init_methods import INIT_METHODS
from pissa.base.start import Origin
from pissa.config import Form, PissaConfig
from pissa.files.config_json import SAVED, config_as_json, config_from_json
from pissa.files.json_file import read_object, reading
from pissa.files.messages import shown
from pissa.layers.layer import PissaLayer

FORMAT = 1
"""The format that is written, and read."""


class _SavedForm(NamedTuple):
    """A Form under the names that the file has for its fields."""

    residual: str
    blocksize: int | None
    double_quant: bool | None


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """The record of one layer: the adapter's rank and scaling, and the base that it belongs to."""

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
    def from_json(record: dict[str, Any]) -> LayerRecord:
        """The way back from `as_json`."""
        form, base = Form(*_SavedForm(**record["form"])), record["base"]
        return LayerRecord(**record | {"form": form, "base": None if base is None else _origin_from_json(base)})


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
            ValueError: naming the file, and what is wrong with it.
        """
        with reading(path, SAVED):
            fields = read_object(path)
            if fields["format"] != FORMAT:
                raise ValueError(
                    f"format {shown(fields['format'])} of pissa {fields.get('pissa_version')!r} is not {FORMAT}, which "
                    f"pissa {ops.build_info()['version']} reads"
                )
            if fields.pop("xxh3") != checksum(fields):
                raise ValueError("xxh3 is not the checksum of the other fields: one of them has been changed")
            layers = {name: LayerRecord.from_json(layer) for name, layer in fields["layers"].items()}
            return AdapterRecord(config_from_json(fields["config"]), layers)


def checksum(record: Mapping[str, Any]) -> str:
    """XXH3-128 of the fields of pissa.json besides its checksum."""
    return xxh3_of_text(json.dumps(record, sort_keys=True))


_ORIGIN = ("r", "scaling", "init", "adalora")


def _origin_as_json(origin: Origin) -> dict[str, Any]:
    return {name: getattr(origin, name) for name in _ORIGIN} | dict(origin.identity)


def _origin_from_json(fields: dict[str, Any]) -> Origin:
    """The way back from `_origin_as_json`."""
    names = INIT_METHODS[fields["init"]].identity_fields("quant_iters" in fields)
    return Origin(**{name: fields[name] for name in _ORIGIN}, identity=tuple((name, fields[name]) for name in names))
