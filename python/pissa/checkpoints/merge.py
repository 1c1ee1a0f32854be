"""Merges an adapter into a checkpoint on disk, a matrix at a time: the model that was trained becomes a checkpoint of
its own, dense or in bitsandbytes' formats."""

from __future__ import annotations

import math
import os
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pissa import ops
from pissa.checkpoints.merge_plan import Planner
from pissa.checkpoints.output import Output
from pissa.checkpoints.packed import of_layer
from pissa.checkpoints.plan import Plan, Unit
from pissa.checkpoints.rewrite import Errors, Result, Rewrite
from pissa.checkpoints.trained import Adapter, Trained, read_adapter
from pissa.config import IMPLICIT, Form
from pissa.files.lora_folder import open_adapter
from pissa.files.source import Source
from pissa.ops.checks import check_choice
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
    initial: str | os.PathLike[str] | None = None,
    progressbar: bool = False,
) -> Merged:
    """Writes the checkpoint in folder `source` with the adapter in folder `adapter` merged into it to `target`.

    Each matrix W is read from the mapped file, W + s (B A - B0 A0) summed in float32, rounded once to the dtype of the
    checkpoint, and written; what the adapter does not change is copied. On a dense base that was trained in that dtype
    these are, bit for bit, the weights of `PissaModel.merge_and_unload`; in another, W is cast to that one first. A run
    that was killed goes on when it is called again with the same arguments, and ends with the same bytes.

    The base function is the one of the training. A stored residual of ours (`quant`) is computed from the weight once
    more, which a fingerprint shows to be the right one: exact, where the plain LoRA is not. `source` may also be what
    `pissa init` has written: then the residual is decoded. For a plain LoRA, and all else that `pissa.convert` reads,
    nothing shows whether the checkpoint is the right one, but names and shapes.

    Args:
        quant: a format, "nf4" or "int8": all linear layers but the output layer are written in it, as transformers with
            bitsandbytes makes it of the merged weights. None: dense.
        initial: the adapter before training, or the residual model that has it; see `pissa.convert`.
        progressbar: one bar over the bytes of the checkpoint, on stderr.

    Raises:
        CompletedError: an earlier call with the same arguments has written all of it; nothing has been changed.
        ValueError: what cannot be read or merged, naming file and layer. `target` has not become a model then.
        OSError: the disk is full, or fails.
    """
    begin = time.perf_counter()
    check_choice("quant", quant, (None, *FORMATS))
    form = IMPLICIT if quant is None else Form.quantised(quant, *FORMATS[quant].options(None, None, 1))
    with Source.open(source) as found, torch.no_grad():
        read = read_adapter(open_adapter(Path(adapter)), found, initial)
        run = _Merge(Planner(found, read.folder, form).plan(), read, form, Path(target))
        run.run(progressbar)
        for doubt in read.doubts():
            warnings.warn(doubt, stacklevel=2)
        return run.merged(time.perf_counter() - begin)


class _Merge(Rewrite):
    command = "merge"

    def __init__(self, plan: Plan, adapter: Adapter, form: Form, target: Path) -> None:
        super().__init__(plan, target)
        self.adapter, self.form = adapter, form

    def merged(self, seconds: float) -> Merged:
        """The report."""
        adapted = [unit for unit in self.plan.units if unit.factors is not None]
        changed = [self.results[unit.name] for unit in adapted]
        lost, change = (sum(result[name] for result in changed) for name in ("lost", "change"))
        return Merged(
            what=self.adapter.what,
            layers=sum(len(unit.layers) for unit in adapted),
            quantised=len(self.plan.packed),
            bytes_read=self.bytes_read,
            bytes_written=self.bytes_written,
            bytes_done_before=self.bytes_done_before,
            seconds=seconds,
            error_of_change=math.sqrt(lost / change) if change else 0.0,
            **Errors.of(self.results)._asdict(),
        )

    def identity(self) -> dict[str, Any]:
        return {"form": self.form.describe(), **states(self.adapter)}

    def write(self, out: Output, unit: Unit) -> dict[str, Result]:
        if unit.tensor is not None:
            out.write(self.file_of(unit.tensor), unit.tensor, self._other_tensor(unit))
            return {unit.name: {}}
        sums = zip(*(self._write(out, trained) for trained in self.adapter.trained(unit)), strict=True)
        lost, whole, change = map(sum, sums)
        return {unit.name: {"lost": lost, "whole": whole, "change": change}}

    def _write(self, out: Output, trained: Trained) -> tuple[float, float, float]:
        """Writes a layer: ‖Q - W'‖², ‖W'‖² and ‖change‖²."""
        layer, weight, change = trained
        dense, form = weight.to(layer.dtype), layer.form
        new: Tensor | ops.QuantizedWeight = dense
        if layer.is_packed:
            with of_layer(layer.name):
                new = ops.quantize(dense, form.kind, blocksize=form.blocksize, double_quant=form.double_quant)
        written = ops.dequantize(new) if isinstance(new, ops.QuantizedWeight) else new
        whole = float(torch.linalg.vector_norm(weight))
        lost = 0.0 if written is weight else float(torch.linalg.vector_norm(weight.sub_(written)))
        if not math.isfinite(whole + lost):
            raise ValueError(f"layer {layer.name}: its merged weight is not finite in {layer.dtype}")
        self.write_layer(out, layer, new)
        return lost**2, whole**2, change

    def _other_tensor(self, unit: Unit) -> Tensor:
        assert unit.tensor is not None
        tensor = self.source.read(unit.tensor)
        if unit.key is None:
            return tensor
        value = self.adapter.folder.weights.read(unit.key)
        if unit.scaling is not None:
            return (tensor.float() + unit.scaling * value.float()).to(tensor.dtype)
        if unit.rows is None:
            return value.to(tensor.dtype)
        return tensor.index_copy(0, torch.tensor(unit.rows), value.to(tensor.dtype))


def states(adapter: Adapter) -> dict[str, str]:
    """The files of an adapter as they are, for the identity of a run."""
    found = {}
    for what, folder in adapter.folders.items():
        for path in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")):
            found[f"{what} {path.name}"] = f"{path.stat().st_size} bytes, {path.stat().st_mtime_ns} ns"
    return found
