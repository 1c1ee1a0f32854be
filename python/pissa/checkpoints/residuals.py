"""The residuals of a folder that `pissa init` has written, as the bases of a model: nothing is decomposed again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pissa import ops
from pissa.base.bitsandbytes import from_state
from pissa.base.digest import Fingerprint, Match, dtype_of, is_fingerprint, match
from pissa.base.init_methods import INIT_METHODS, nothing_of
from pissa.base.start import Origin, StartFactors
from pissa.base.stored import Replaced, residual_tensors, stored_linear
from pissa.checkpoints.fill import check_shape, of_layer, put
from pissa.checkpoints.packed import Entries
from pissa.checkpoints.split_plan import INITIAL_WEIGHTS, start_tensors
from pissa.config import Form, PissaConfig
from pissa.files.fit import other_dtype
from pissa.files.messages import shown
from pissa.files.pissa_layout import PISSA_RECORD, PISSA_WEIGHTS, TAKEN
from pissa.files.plain_lora import factors_of
from pissa.files.record import AdapterRecord, LayerRecord
from pissa.files.tensor_file import TensorFile
from pissa.layers.layer import PissaLayer, pissa_layers


@dataclass(frozen=True)
class Residuals:
    """What a folder says of its residuals, beside the tensors of the model."""

    folder: Path
    record: AdapterRecord
    factors: TensorFile
    """The start factors that the adapter and its base begin with."""
    taken: TensorFile | None
    """The factors that the residuals lack, if alternations have found others."""

    @staticmethod
    def open(folder: Path) -> Residuals:
        """Reads the record, and the header of the factors.

        Raises:
            ValueError: one of them is missing or damaged, naming the file.
        """
        record = AdapterRecord.read(folder / PISSA_RECORD)
        factors = TensorFile(folder / INITIAL_WEIGHTS)
        has_taken = any(layer.taken is not None for layer in record.layers.values())
        return Residuals(folder, record, factors, TensorFile(folder / PISSA_WEIGHTS) if has_taken else None)

    def fill(self, model: nn.Module, packed: Mapping[str, Entries], config: PissaConfig) -> None:
        """Puts a stored base, with the start that it lacks, into every layer of the record.

        Each residual and its start are compared with their fingerprints: a residual's pages are read once, as a first
        step of training would.

        Args:
            model: the (unwrapped) model, adapted. Residuals that are not packed are its weights.
            packed: the other ones.
            config: that of the adapter.

        Raises:
            ValueError: naming the layer: a residual that is not the one which was written, or has another shape or
                form, factors that a file lacks or has other values of, or a layer that has no adapter.
        """
        adapted, records = pissa_layers(model), self.record.layers
        for name in [*records, *packed]:
            if name not in records:
                raise ValueError(f"{self.folder / PISSA_RECORD} has no layer {shown(name)}, whose weight is packed")
            if name not in adapted:
                raise ValueError(
                    f"layer {shown(name)} has no adapter, but {self.folder} keeps a residual of it, which lacks its "
                    "principal part: let target_modules have it, as it has if no configuration is given"
                )
        layers = {name: layer for name, layer in adapted.items() if name in records}
        starts = self._starts(model, layers)
        narrower = {}
        for name, layer in layers.items():
            with of_layer(name):
                residual, found = self._residual(records[name], layer, packed.get(name))
                self._check_start(records[name], starts[name])
                _put(model, name, layer, records[name], residual, starts[name], config)
            if found is Match.ROUNDED:
                narrower[name] = layer.dense_dtype
            else:
                layer.fingerprints.learn_residual(layer.base, str(records[name].stored))
        if narrower:
            was = dtype_of(str(records[next(iter(narrower))].stored))
            warnings.warn(other_dtype(self.folder, narrower, was), stacklevel=3)  # the caller of load

    def _starts(self, model: nn.Module, layers: Mapping[str, PissaLayer]) -> dict[str, StartFactors]:
        starts = {}
        for part in factors_of(model, layers):
            r = self.record.layers[part.layers[0]].r
            for key, shape in part.shapes(r).items():
                self.factors.expect(key, shape, (torch.float32,), f"the start factors of layer {part.layers[0]}")
            for name, (a0, b0) in part.unpack(*(self.factors.read(key) for key in part.keys)).items():
                origin = self._origin(self.record.layers[name])
                starts[name] = StartFactors(a0, b0, origin, self._taken(name, a0, b0, origin))
        return starts

    def _taken(self, name: str, a0: Tensor, b0: Tensor, origin: Origin) -> tuple[Tensor, Tensor] | None:
        rank = self.record.layers[name].taken
        if rank is None or self.taken is None:
            return nothing_of(a0, b0) if INIT_METHODS[origin.init].takes_nothing else None
        keys = [f"{name}.{part}" for part in TAKEN]
        for key, shape in zip(keys, ((rank, a0.shape[1]), (b0.shape[0], rank)), strict=True):
            self.taken.expect(key, shape, (torch.float32,), f"the factors that the residual of layer {name} lacks")
        a, b = (self.taken.read(key) for key in keys)
        return a, b

    def _check_start(self, record: LayerRecord, start: StartFactors) -> None:
        if not is_fingerprint(record.start, *start_tensors(start)):
            paths = " or ".join(str(file.path) for file in (self.factors, self.taken) if file is not None)
            raise ValueError(
                f"its start factors are not those of which {self.folder / PISSA_RECORD} has the fingerprint: {paths} "
                "is damaged, or belongs to another folder; take it from a copy, or split the model again"
            )

    def _origin(self, record: LayerRecord) -> Origin:
        config = self.record.config.of_base()
        identity = INIT_METHODS[config.init].identity(config)
        return record.base or Origin(record.r, record.scaling, config.init, config.use_adalora, identity)

    def _residual(
        self, record: LayerRecord, layer: PissaLayer, entries: Entries | None
    ) -> tuple[Tensor | ops.QuantizedWeight, Match]:
        if entries is None:
            residual: Tensor | ops.QuantizedWeight = layer.base.matrix().detach().contiguous()
            form = Form("explicit")
        else:
            residual = from_state(entries)
            form = Form.quantised(residual.format, residual.blocksize, residual.nested)
        check_shape((residual.shape[0], residual.shape[1]), layer.base)
        if form != record.form:
            raise ValueError(
                f"its residual is {form.describe()} in the folder's tensors and {record.form.describe()} in "
                f"{PISSA_RECORD}: the files do not belong together"
            )
        found = match(record.stored, *residual_tensors(residual).values())
        if found is Match.OTHER:
            raise ValueError(
                f"its residual is not the one of which {self.folder / PISSA_RECORD} has the fingerprint: a file is "
                "damaged, or belongs to another folder"
            )
        return residual, found


def _put(
    model: nn.Module,
    name: str,
    layer: PissaLayer,
    record: LayerRecord,
    residual: Tensor | ops.QuantizedWeight,
    start: StartFactors,
    config: PissaConfig,
) -> None:
    base = layer.base
    replaced = Replaced(base.dense_type, layer.dense_dtype, base.bias, Fingerprint(record.weight))
    put(model, name, stored_linear(replaced, residual, start, getattr(torch, config.quant_storage)))
