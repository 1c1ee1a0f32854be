"""An adapter in a folder, as far as it can be read without a model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pissa.base.init_methods import INIT_METHODS, nothing_of
from pissa.base.start import Deltas, Origin, StartFactors
from pissa.config import PissaConfig
from pissa.files.config_json import read_config_alone
from pissa.files.hub import adapter_folder
from pissa.files.peft_layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, magnitude_key
from pissa.files.pissa_layout import CONFIG_FILES, PISSA_RECORD, PISSA_WEIGHTS, TAKEN
from pissa.files.record import AdapterRecord, LayerRecord
from pissa.files.tensor_file import TensorFile
from pissa.ops.low_rank import split_difference


@dataclass(frozen=True)
class LayerTensors:
    """The tensors of one layer, float32, as they were in memory."""

    start: StartFactors
    deltas: Deltas
    base: StartFactors
    """The part that a stored base lacks: the adapter's own start unless the record says otherwise."""
    magnitude: tuple[Tensor, Tensor] | None
    """With DoRA, the trained lengths and the norms of the base's rows."""


@dataclass(frozen=True)
class Checkpoint:
    """The record of an adapter, and the headers of its tensors."""

    folder: Path
    config: PissaConfig
    records: dict[str, LayerRecord]
    """By the layer's name in the (unwrapped) model."""
    weights: TensorFile
    starts: TensorFile

    @staticmethod
    def read(folder: Path, config: PissaConfig | None = None) -> Checkpoint:
        """Reads the folder that `save_pretrained` wrote for one adapter.

        Args:
            config: the user's, which takes the place of the saved one.

        Raises:
            ValueError: no PiSSA adapter there, a damaged file, naming the file, or a `config` of another adapter.
            TypeError: `config` is no PissaConfig.
        """
        folder = folder.absolute()  # `blamed` looks for it in messages, where "q" is a part of "q_proj"
        record = _read_record(folder)
        if config is not None:
            _check_alike(config, record.config, folder)
        weights, starts = TensorFile(folder / ADAPTER_WEIGHTS), TensorFile(folder / PISSA_WEIGHTS)
        return Checkpoint(folder, config or record.config, record.layers, weights, starts)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Says of an error in the block that the folder's configuration does not fit the model.

        Raises:
            ValueError: naming the file, for any error that PEFT or our layers raise about a configuration.
        """
        try:
            yield
        except (ValueError, TypeError, AttributeError, LookupError, NotImplementedError, re.error) as error:
            if str(self.folder) in str(error):
                raise
            record = self.folder / PISSA_RECORD
            raise ValueError(f"the adapter that {record} describes cannot be put on this model: {error}") from error

    def read_layer(self, name: str, a: Tensor, b: Tensor, origin: Origin) -> LayerTensors:
        """Reads the tensors of a layer.

        Args:
            a, b: its factors in PEFT's file, [A ; dA] and [dB | B0].
            origin: that of the start factors.

        Raises:
            ValueError: the two files do not belong together.
        """
        record, read = self.records[name], self.starts.read
        a0 = read(f"{name}.a0")
        upper, *rest = split_difference(a, b)
        da, db, b0 = (part.contiguous() for part in rest)
        if not torch.equal(upper, a0 + da):
            raise ValueError(self._mismatch(name, "does not start with a0 + dA"))
        taken = self._taken(name, a0, b0, origin if record.base is None else record.base)
        start, deltas = StartFactors(a0, b0, origin, None if record.base else taken), Deltas(da, db)
        if self.config.use_adalora:
            deltas = Deltas(read(f"{name}.delta_a"), db, read(f"{name}.delta_e"))
            # Not to the bit: other machines sum norms in another order.
            if not torch.allclose(start.change(deltas)[0], da, rtol=1e-5, atol=1e-6 * float(a0.abs().max())):
                raise ValueError(self._mismatch(name, "is not made of delta_a and delta_e"))
        base = start
        if record.base is not None:
            base = StartFactors(read(f"{name}.base.a0"), read(f"{name}.base.b0"), record.base, taken)
        magnitude = (self.weights.read(magnitude_key(name)), read(f"{name}.norm")) if self.config.use_dora else None
        return LayerTensors(start, deltas, base, magnitude)

    def _taken(self, name: str, a0: Tensor, b0: Tensor, origin: Origin) -> tuple[Tensor, Tensor] | None:
        """What the residual of a layer lacks instead of the start factors of its base, whose origin this is."""
        if self.records[name].taken is not None:
            a, b = (self.starts.read(f"{name}.{part}") for part in TAKEN)
            return a, b
        return nothing_of(a0, b0) if INIT_METHODS[origin.init].takes_nothing else None

    def _mismatch(self, name: str, reason: str) -> str:
        return (
            f"{self.weights.path} and {self.starts.path} do not belong together, or one is damaged: the tensor lora_A "
            f"of layer {name} {reason}"
        )


def read_config(model_id: str | os.PathLike[str], *, subfolder: str | None = None, **kwargs: Any) -> PissaConfig:
    """The configuration of an adapter, or the one that `PissaConfig.save_pretrained` wrote, from a folder or a
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
    of_start = ("init", "repair", "start_norm", "svd", "svd_passes", "seed", "quant_iters")
    for name in (*of_start, "form", "use_adalora", "use_dora"):
        given, needed = getattr(config, name), getattr(saved, name)
        if given != needed:
            raise ValueError(
                f"config: {name} is {given!r}, the adapter in {folder} was saved with {needed!r}: leave config out, or "
                "change the one that pissa.PissaConfig.from_pretrained reads there"
            )
