"""Merges an adapter into a checkpoint on disk, a matrix at a time: the model that was trained becomes a checkpoint of
its own, dense or in bitsandbytes' formats."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pissa import ops
from pissa.base.bitsandbytes_state import to_bitsandbytes
from pissa.checkpoints.fill import of_layer
from pissa.checkpoints.merge_plan import MergedLayer, MergePlan, Unit
from pissa.checkpoints.new_files import copy_small_files, index_text, quantization_config
from pissa.checkpoints.output import Output
from pissa.checkpoints.progress import bar_of_bytes
from pissa.checkpoints.trained import Adapter, Trained, read_adapter
from pissa.config import IMPLICIT, Form
from pissa.files.model_folder import CONFIG, parts_of, read_config
from pissa.files.source import INDEX, Source
from pissa.ops.formats import FORMATS


class Merged(NamedTuple):
    """What `merge` has done."""

    what: str
    """What the adapter is, in words."""
    layers: int
    """Whose weights the adapter changes."""
    quantised: int
    """Layers that are written in codes."""
    bytes_read: int
    """Of the checkpoint; by this run and by those that it went on with."""
    bytes_written: int
    bytes_done_before: int
    """Of the checkpoint, by runs that this one went on with."""
    seconds: float
    """Of this run."""
    error: float
    """‖Q - W'‖ / ‖W'‖ over the layers that are merged or written in codes: W' is the sum in float32, Q what is
    written."""
    error_of_change: float
    """‖Q - W'‖ / ‖change‖ over the layers that the adapter changes."""
    worst: str | None
    """The layer, or the stack of experts, of the largest error; None if there is none."""
    error_of_worst: float
    mean_error: float
    """Of the layers, each by itself."""


def merge(
    adapter: str | os.PathLike[str],
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    quant: str | None = None,
    blocksize: int | None = None,
    double_quant: bool | None = None,
    initial: str | os.PathLike[str] | None = None,
    progressbar: bool = False,
) -> Merged:
    """Writes the checkpoint in folder `source` with the adapter in folder `adapter` merged into it to `target`.

    Each matrix W is read from the mapped file, W + s (B A - B0 A0) summed in float32, rounded once to the dtype of the
    checkpoint, and written; what the adapter does not change is copied. On a dense base that was trained in that dtype
    these are, bit for bit, the weights of `PissaModel.merge_and_unload`; in another, W is cast to that one first. A run
    that was killed goes on when it is called again with the same arguments, and ends with the same bytes.

    The base function is the one of the training:

    - An adapter of ours, on the checkpoint that it was trained on, which a fingerprint of each weight shows. If it was
      trained with a stored residual (`quant`), that is computed from the weight once more: exact, where the plain LoRA
      is not.
    - `source` may be what `pissa init` has written, a residual and its start: then the residual is decoded.
    - A plain LoRA, and all that `pissa.convert` reads, on the checkpoint that is given; nothing shows whether it is the
      right one, but for names and shapes. One that was trained on a residual lacks that one's rounding.

    Args:
        quant: a format, "nf4" or "int8": all linear layers but the output layer are written in it, as transformers with
            bitsandbytes makes it of the merged weights. None: dense.
        blocksize, double_quant: of the format; see `pissa.ops.quantize`.
        initial: the adapter before training, or the residual model that has it; see `pissa.convert`.
        progressbar: one bar over the bytes of the checkpoint, on stderr.

    Raises:
        CompletedError: an earlier call with the same arguments has written all of it; nothing has been changed.
        ValueError: what cannot be read or merged, naming file and layer. `target` has not become a model then.
        OSError: the disk is full, or fails.
    """
    begin = time.perf_counter()
    form = IMPLICIT if quant is None else _form(quant, blocksize, double_quant)
    with Source.open(source) as found, torch.no_grad():
        read = read_adapter(Path(adapter), found, initial)
        plan = MergePlan.of(found, read.folder, form)
        run = _Run(plan, read, Path(target))
        before = run.do(progressbar)
        for doubt in read.doubts():
            warnings.warn(doubt, stacklevel=2)
        return run.merged(before, time.perf_counter() - begin)


def _form(quant: str, blocksize: int | None, double_quant: bool | None) -> Form:
    if quant not in FORMATS:
        raise ValueError(f"quant: got {quant!r}; allowed: None, {', '.join(map(repr, FORMATS))}")
    return Form.quantised(quant, *FORMATS[quant].options(blocksize, double_quant, 1))


class _Run:
    def __init__(self, plan: MergePlan, adapter: Adapter, target: Path) -> None:
        self.plan, self.adapter, self.target = plan, adapter, target
        self.sizes = {unit.name: _nbytes(plan.source, unit) for unit in plan.units}
        self.results: dict[str, list[float]] = {}

    def do(self, progressbar: bool) -> int:
        """Writes all files. Returns the bytes of the checkpoint that an earlier run had done."""
        plan, source = self.plan, self.plan.source
        with Output(self.target, self._identity(), plan.files) as out:
            self.results = {unit.name: out.done[unit.name] for unit in plan.units if unit.name in out.done}
            before = sum(self.sizes[name] for name in self.results)
            left = [unit for unit in plan.units if unit.name not in self.results]
            with bar_of_bytes("merge", sum(self.sizes.values()), before) if progressbar else nullcontext() as bar:
                for unit, following in zip(left, [*left[1:], None], strict=True):
                    if following is not None:
                        source.ahead(following.tensors)
                    try:
                        self.results[unit.name] = self._write(out, unit)
                    except ValueError:
                        out.discard()
                        raise
                    source.release(unit.tensors)
                    out.add(unit.name, self.results[unit.name])
                    if bar is not None:
                        bar.update(self.sizes[unit.name])
            copy_small_files(source.folder, out)
            out.path("config.json").write_text(_config_text(plan))
            if (index := index_text(source, plan.files)) is not None:
                out.path(INDEX).write_text(index)
            out.finish()
        return before

    def merged(self, before: int, seconds: float) -> Merged:
        """The report."""
        layers = list(self.plan.layers.values())
        adapted = [unit for unit in self.plan.units if unit.factors is not None]
        lost, whole, _ = self._sums(self.plan.units)
        lost_of_change, _, change = self._sums(adapted)
        found = {name: math.sqrt(sums[0] / sums[1]) for name, sums in self.results.items() if sums and sums[1]}
        worst = max(found, key=found.__getitem__, default=None)
        return Merged(
            what=self.adapter.what,
            layers=sum(len(unit.layers) for unit in adapted),
            quantised=sum(layer.form != IMPLICIT for layer in layers),
            bytes_read=sum(self.sizes.values()),
            bytes_written=sum(layout.size for layout in self.plan.files.values()),
            bytes_done_before=before,
            seconds=seconds,
            error=math.sqrt(lost / whole) if whole else 0.0,
            error_of_change=math.sqrt(lost_of_change / change) if change else 0.0,
            worst=worst,
            error_of_worst=0.0 if worst is None else found[worst],
            mean_error=sum(found.values()) / max(1, len(found)),
        )

    def _sums(self, units: Iterable[Unit]) -> list[float]:
        found = [self.results[unit.name] for unit in units if self.results[unit.name]]
        return [sum(column) for column in zip(*found, strict=True)] if found else [0.0, 0.0, 0.0]

    def _identity(self) -> dict[str, Any]:
        """What has influence on the bytes."""
        return {
            "command": "merge",
            "pissa": ops.build_info()["version"],
            "form": self.plan.form.describe(),
            **{what: states(folder) for what, folder in self.adapter.folders.items()},
            **{f"source {name}": value for name, value in self.plan.source.identity().items()},
        }

    def _write(self, out: Output, unit: Unit) -> list[float]:
        """Writes what becomes of a unit. Returns ‖Q - W'‖², ‖W'‖² and ‖change‖² of its layers, if it has any."""
        if unit.tensor is not None:
            out.write(self._file(unit.tensor), unit.tensor, self._other_tensor(unit))
            return []
        sums = [0.0, 0.0, 0.0]
        for trained in self.adapter.trained(unit):
            for index, value in enumerate(self._write_layer(out, trained)):
                sums[index] += value
        return sums

    def _write_layer(self, out: Output, trained: Trained) -> tuple[float, float, float]:
        layer, weight, change = trained
        rounded, form, codes = weight.to(layer.dtype), layer.form, None
        if form != IMPLICIT:
            with of_layer(layer.name):
                codes = ops.quantize(rounded, form.kind, blocksize=form.blocksize, double_quant=form.double_quant)
        written = rounded if codes is None else ops.dequantize(codes)
        whole = float(torch.linalg.vector_norm(weight))
        lost = 0.0 if written is weight else float(torch.linalg.vector_norm(weight.sub_(written)))
        if not math.isfinite(whole + lost):
            raise ValueError(f"layer {layer.name}: its merged weight is not finite in {layer.dtype}")
        if codes is None:
            for name, values, first in self._dense_tensors(layer, rounded):
                out.write(self._file(name), name, values, first)
        else:
            for name, values in to_bitsandbytes(codes, layer.dtype).items():
                out.write(self._file(layer.tensors[0]), f"{layer.target}.{name}", values)
        return lost**2, whole**2, change

    def _dense_tensors(self, layer: MergedLayer, matrix: Tensor) -> Iterable[tuple[str, Tensor, int | None]]:
        if layer.entries:
            return [(layer.parts[0].tensor, matrix, None)]
        return parts_of(matrix, layer.parts, self.plan.source)

    def _other_tensor(self, unit: Unit) -> Tensor:
        assert unit.tensor is not None
        tensor = self.plan.source.read(unit.tensor)
        if unit.key is None:
            return tensor
        value = self.adapter.folder.weights.read(unit.key)
        if unit.scaling is not None:
            return (tensor.float() + unit.scaling * value.float()).to(tensor.dtype)
        if unit.rows is None:
            return value.to(tensor.dtype)
        return tensor.index_copy(0, torch.tensor(unit.rows), value.to(tensor.dtype))

    def _file(self, tensor: str) -> str:
        return self.plan.source.entry(tensor).path.name


def _nbytes(source: Source, unit: Unit) -> int:
    return sum(source.entry(tensor).nbytes for tensor in unit.tensors)


def states(folder: Path) -> dict[str, str]:
    """The files of an adapter as they are."""
    paths = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return {path.name: f"{path.stat().st_size} bytes, {path.stat().st_mtime_ns} ns" for path in paths}


def _config_text(plan: MergePlan) -> str:
    """config.json, with what transformers has to know of layers in codes."""
    config = read_config(plan.source.folder)
    was_packed = config.pop("quantization_config", None) is not None
    if plan.form == IMPLICIT and not was_packed:
        return (plan.source.folder / CONFIG).read_text(encoding="utf-8")
    quantised = [layer for layer in plan.layers.values() if layer.form != IMPLICIT]
    if quantised:
        config["quantization_config"] = quantization_config(plan.form, quantised[0].dtype, plan.dense_linears)
    return json.dumps(config, indent=2) + "\n"
