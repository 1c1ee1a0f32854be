"""A QPiSSA adapter for transformers and PEFT alone: its residual as a checkpoint of bitsandbytes, and a LoRA on that.
Nothing is quantised once more, so the two are the model that was trained."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pissa import ops
from pissa.base.bitsandbytes_state import to_bitsandbytes
from pissa.base.init_methods import INIT_METHODS
from pissa.base.kinds import base_of
from pissa.checkpoints.merge import states
from pissa.checkpoints.merge_plan import MergedLayer, Planner, Unit
from pissa.checkpoints.new_files import copy_small_files, index_text, quantization_config
from pissa.checkpoints.output import Output
from pissa.checkpoints.progress import bar_of_bytes
from pissa.checkpoints.trained import Ours, Weight, read_weight
from pissa.config import IMPLICIT
from pissa.files.checkpoint import LayerTensors
from pissa.files.lora_config import with_sizes
from pissa.files.lora_folder import LoraFactors
from pissa.files.model_folder import parts_of, read_config
from pissa.files.peft_layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Matrices, base_weight_key
from pissa.files.record import LayerRecord
from pissa.files.safetensors_header import Layout
from pissa.files.source import INDEX
from pissa.integrations.exported import Exported

LORA = "adapter"
"""The folder of the LoRA, in that of the checkpoint."""

_LORA_WEIGHTS = f"{LORA}/{ADAPTER_WEIGHTS}"


def export_bnb4(adapter: Ours, target: Path, progressbar: bool) -> Exported:
    """Writes the residuals that the adapter was trained on to `target`, and the adapter, of rank r, to its folder
    "adapter".

    bitsandbytes keeps linear layers. The residual of another layer in 4 bits, of fused experts or a Conv1D, is written
    decoded, in the dtype of the checkpoint. A run that was killed goes on when it is called again.

    Args:
        adapter: whose base the checkpoint `adapter.source` is, or has the residuals of.

    Raises:
        ValueError: the checkpoint is another one, or bitsandbytes can keep no layer. `target` has not become a model
            then.
        OSError: the disk is full, or fails.
    """
    run = _Run(adapter, target)
    run.do(progressbar)
    return run.exported()


class _Errors(NamedTuple):
    """Of the residuals of a unit that are written dense, ‖written - Q‖² and ‖Q‖²."""

    lost: float
    whole: float


class _Run:
    def __init__(self, adapter: Ours, target: Path) -> None:
        self.adapter, self.source, self.folder, self.target = adapter, adapter.source, adapter.folder, target
        self.planner = Planner(self.source, self.folder, IMPLICIT)
        self.units = list(self._units())
        self.packed = [layer for unit in self.units for layer in unit.layers if layer.form != IMPLICIT]
        if not self.packed:
            raise ValueError(
                f"{self.folder.config_path.parent} has no linear layer in 4 bits, the only kind that bitsandbytes "
                "keeps so: export to merged"
            )
        self.files = self.planner.files(self.units) | {_LORA_WEIGHTS: self._lora_layout()}
        self.errors: dict[str, _Errors] = {}

    def do(self, progressbar: bool) -> None:
        """Writes all files."""
        source, sizes = self.source, {unit.name: self._nbytes(unit) for unit in self.units}
        with Output(self.target, self._identity(), self.files) as out:
            self.errors = {unit.name: _Errors(*out.done[unit.name]) for unit in self.units if unit.name in out.done}
            left = [unit for unit in self.units if unit.name not in self.errors]
            before = sum(sizes[name] for name in self.errors)
            with bar_of_bytes("export", sum(sizes.values()), before) if progressbar else nullcontext() as bar:
                for unit, following in zip(left, [*left[1:], None], strict=True):
                    if following is not None:
                        source.ahead(following.tensors)
                    try:
                        self.errors[unit.name] = self._write(out, unit)
                    except ValueError:
                        out.discard()
                        raise
                    source.release(unit.tensors)
                    out.add(unit.name, self.errors[unit.name])
                    if bar is not None:
                        bar.update(sizes[unit.name])
            for key in self._kept_keys():
                out.write(_LORA_WEIGHTS, key, self.folder.weights.read(key))
            copy_small_files(source.folder, out)
            out.path(f"{LORA}/{ADAPTER_CONFIG}").write_text(self._lora_config())
            out.path("config.json").write_text(self._model_config())
            model_files = {name: layout for name, layout in self.files.items() if name != _LORA_WEIGHTS}
            if (index := index_text(source, model_files)) is not None:
                out.path(INDEX).write_text(index)
            out.finish()

    def exported(self) -> Exported:
        """The report."""
        rounded = {name: errors for name, errors in self.errors.items() if errors.lost}
        each = {name: math.sqrt(errors.lost / errors.whole) for name, errors in rounded.items()}
        lost, whole = (sum(column) for column in zip(*rounded.values(), strict=True)) if rounded else (0.0, 0.0)
        worst = max(each, key=each.__getitem__, default=None)
        in_codes = sum(
            self.adapter.records[layer.name].form.kind == "nf4" for unit in self.units for layer in unit.layers
        )
        count = in_codes - len(self.packed)
        dense = f", {count} decoded, since bitsandbytes has no experts and no Conv1D in 4 bits" if count else ""
        model = f"{type(self.planner.model).__name__}.from_pretrained({str(self.target)!r})"
        return Exported(
            what=self.adapter.what,
            layers=sum(len(factors.layers) for factors in self.folder.factors.values()),
            written=f"{len(self.packed)} residuals in nf4{dense}, and a LoRA on them in {LORA}",
            bytes_written=sum(layout.size for layout in self.files.values()),
            load=f"PeftModel.from_pretrained({model}, {str(self.target / LORA)!r})",
            error=math.sqrt(lost / whole) if whole else 0.0,
            worst=worst,
            error_of_worst=0.0 if worst is None else each[worst],
            mean_error=sum(each.values()) / max(1, len(each)),
        )

    def _units(self) -> Iterator[Unit]:
        """The stored layers, and the tensors that are copied, in the order of the files."""
        stored = [self._stored_unit(factors) for factors in self.folder.factors.values() if self._is_stored(factors)]
        changed = {tensor for unit in stored for tensor in unit.tensors}
        copied = [Unit(f"copy {name}", tensor=name) for name in self.source.names if name not in changed]
        places = {name: number for number, name in enumerate(self.source.names)}
        yield from sorted([*stored, *copied], key=lambda unit: min(places[tensor] for tensor in unit.tensors))

    def _stored_unit(self, factors: LoraFactors) -> Unit:
        if factors.is_fused and factors.layers[0] in self.planner.packed:
            raise ValueError(
                f"{self.source.folder} has the experts of {factors.target} in 4 bits, which only pissa.load reads: "
                "give the checkpoint that was split (base)"
            )
        unit = self.planner.unit_of(factors)
        layers = []
        for layer in unit.layers:
            form = self.adapter.records[layer.name].form
            is_kept = form.kind == "nf4" and layer.name == factors.target and not layer.transposed
            layers.append(layer._replace(form=form if is_kept else IMPLICIT))
        return unit._replace(layers=tuple(layers))

    def _is_stored(self, factors: LoraFactors) -> bool:
        return self.adapter.records[factors.layers[0]].form != IMPLICIT

    def _nbytes(self, unit: Unit) -> int:
        return sum(self.source.entry(tensor).nbytes for tensor in unit.tensors)

    def _identity(self) -> dict[str, Any]:
        """What has influence on the bytes."""
        return {
            "command": "export to bnb4",
            "pissa": ops.build_info()["version"],
            "target": str(self.target),
            **{what: states(folder) for what, folder in self.adapter.folders.items()},
            **{f"source {name}": value for name, value in self.source.identity().items()},
        }

    # -- the checkpoint

    def _write(self, out: Output, unit: Unit) -> _Errors:
        """Writes what becomes of a unit."""
        if unit.factors is None:
            assert unit.tensor is not None
            out.write(self._file(unit.tensor), unit.tensor, self.source.read(unit.tensor))
            return _Errors(0.0, 0.0)
        pairs, lost, whole = [], 0.0, 0.0
        for layer, factors in zip(unit.layers, self.adapter.factors(unit.factors.target), strict=True):
            residual = self.adapter.residual(layer, read_weight(layer, self.source), factors)
            if layer.form == IMPLICIT:
                errors = self._write_dense(out, layer, residual)
                lost, whole = lost + errors.lost, whole + errors.whole
            else:
                assert isinstance(residual, ops.QuantizedWeight)
                for name, values in to_bitsandbytes(residual, layer.dtype).items():
                    out.write(self._file(layer.tensors[0]), f"{layer.target}.{name}", values)
            pairs.append(on_residual(self.adapter.records[layer.name], self.adapter.tensors(layer.name, factors)))
        for key, tensor in unit.factors.pack(pairs).items():
            out.write(_LORA_WEIGHTS, key, tensor)
        return _Errors(lost, whole)

    def _write_dense(self, out: Output, layer: MergedLayer, residual: Weight) -> _Errors:
        exact = ops.dequantize(residual) if isinstance(residual, ops.QuantizedWeight) else residual.float()
        written = exact.to(layer.dtype)
        for name, values, member in parts_of(written, layer.parts, self.source):
            out.write(self._file(name), name, values, member)
        lost = torch.linalg.vector_norm(written.float() - exact)
        return _Errors(float(lost) ** 2, float(torch.linalg.vector_norm(exact)) ** 2)

    def _file(self, tensor: str) -> str:
        return self.source.entry(tensor).path.name

    def _model_config(self) -> str:
        """config.json, with what transformers has to know of the packed layers."""
        config = read_config(self.source.folder)
        packed = {layer.name for layer in self.packed} | self.planner.packed.keys()
        dense = [
            name
            for name, module in self.planner.model.named_modules()
            if base_of(module).kind in (nn.Linear, Conv1D) and name not in packed
        ]
        first = self.packed[0]
        config["quantization_config"] = quantization_config(first.form, first.dtype, dense)
        return json.dumps(config, indent=2) + "\n"

    # -- the LoRA

    def _kept_keys(self) -> list[str]:
        """The tensors of the adapter that stay as they are. A layer's own weight does not: its residual is written."""
        stored = [factors for factors in self.folder.factors.values() if self._is_stored(factors)]
        gone = {key for factors in stored for key in (*factors.keys, base_weight_key(factors.target))}
        return [name for name in self.folder.weights.names if name not in gone]

    def _lora_layout(self) -> Layout:
        weights = self.folder.weights
        tensors = {name: (weights.dtype(name), weights.shape(name)) for name in self._kept_keys()}
        for factors in self.folder.factors.values():
            if self._is_stored(factors):
                shapes = factors.shapes(self._rank(factors))
                tensors |= {key: (torch.float32, shape) for key, shape in shapes.items()}
        return Layout(tensors, {"format": "pt"})

    def _rank(self, factors: LoraFactors) -> int:
        record = self.adapter.records[factors.layers[0]]
        return factors.rank if record.form == IMPLICIT else rank_on_residual(record, self.adapter.init)

    def _lora_config(self) -> str:
        """adapter_config.json."""
        sizes = {target: (self._rank(factors), factors.scaling) for target, factors in self.folder.factors.items()}
        config = with_sizes(self.folder.config, sizes) | {"base_model_name_or_path": str(self.target)}
        return json.dumps(config, indent=2, sort_keys=True)


def rank_on_residual(record: LayerRecord, init: str) -> int:
    """The rank of what `on_residual` gives."""
    if record.base is None:
        return record.r
    lacks = 0 if INIT_METHODS[record.base.init].starts_from_zero else record.base.r
    return lacks + (1 if INIT_METHODS[init].starts_from_zero else 2) * record.r


def on_residual(record: LayerRecord, tensors: LayerTensors) -> Matrices:
    """Factors a [k, in] and b [out, k] of what a stored layer computes beside its residual, s b a.

    That is s B A, if the adapter starts from what the residual lacks. If its base lacks the start of another method, it
    is that start and s (B A - B0 A0).
    """
    start, base = tensors.start, tensors.base
    if record.base is None:
        return start.factors_on(tensors.deltas, True, None, 1.0)
    is_zero = INIT_METHODS[start.origin.init].starts_from_zero
    lacked = None if INIT_METHODS[record.base.init].starts_from_zero else (base.a0, base.b0)
    return start.factors_on(tensors.deltas, is_zero, lacked, record.base.scaling / record.scaling)
