"""Splits a checkpoint on disk, a few matrices at a time: the residuals become a checkpoint of the same files, the start
factors a plain LoRA beside it."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pissa import distributed, ops
from pissa.base.digest import fingerprint, read
from pissa.base.init_methods import INIT_METHODS, StartTask, start_factors
from pissa.base.start import StartFactors
from pissa.base.stored import residual_tensors as tensors_of
from pissa.base.stored import residuals_of
from pissa.checkpoints.new_files import (
    INITIAL_CONFIG,
    INITIAL_WEIGHTS,
    has_taken,
    layouts,
    start_tensors,
    taken_tensors,
)
from pissa.checkpoints.output import Output
from pissa.checkpoints.plan import DENSE, Plan, PlannedLayer
from pissa.checkpoints.rewrite import Errors, Result, Rewrite
from pissa.config import PissaConfig
from pissa.files.peft_layout import FactorTensors
from pissa.files.pissa_layout import PISSA_RECORD, PISSA_WEIGHTS
from pissa.files.plain_lora import config_text as lora_config_text
from pissa.files.record import AdapterRecord, LayerRecord
from pissa.files.source import Source
from pissa.ops.formats import FORMATS

MEMORY = 10**9
"""Bytes in flight, unless another number is given."""

# Elements of the matrices that are split at once, for each thread: as many as `model.decompose` takes.
_GROUP = 1 << 22

_SAMPLE = 64
"""The part of the rows, the first ones of a matrix, that is compared with the residual and the factors; but at least
16 rows. It takes 1 to 3 % of the time."""


class Initialised(NamedTuple):
    """What `init` has done."""

    layers: int
    bytes_read: int
    """Of the checkpoint; by this run and by those that it went on with."""
    bytes_written: int
    bytes_done_before: int
    """Of the checkpoint, by runs that this one went on with."""
    seconds: float
    """Of this run."""
    error: float
    """‖W - Q - s B0 A0‖ / ‖W‖ over all layers, from the first 64th of the rows of each."""
    memory: int
    """Bytes in flight, at most."""
    largest: str
    """The layer that needs most of it by itself."""
    only_ours: bool
    """Whether only `pissa.load` reads the result: quantised fused experts."""


def init(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    config: PissaConfig,
    *,
    memory: int = MEMORY,
    device: str | torch.device = "cpu",
    experts: str = DENSE,
    progressbar: bool = False,
) -> Initialised:
    """Writes the residuals of a checkpoint as a checkpoint, and the start factors as a LoRA in its folder pissa_init:
    the layout in which the paper's authors publish theirs, so that whatever trains a LoRA on a model trains PiSSA.

    Each matrix is read from the mapped file, split, and written. A run that was killed goes on when it is called again
    with the same arguments, and ends with the same bytes. With several processes (torch.distributed) all of them have
    to call this; they share the work, and write into the same files.

    Args:
        source: folder of a checkpoint in safetensors, with config.json.
        target: a new folder, or one of an unfinished run.
        config: `quant` says how the residual is kept: None as a dense weight.
        memory: bytes of matrices and of what is computed from them at a time. A matrix that needs more gets it. Not
            counted are the start factors of a stack of experts, which wait for those of its last expert: float32, r
            times its rows and columns for each.
        device: where they are split.
        experts: see `Plan.of`.
        progressbar: one bar over the bytes of the checkpoint, on stderr.

    Raises:
        CompletedError: an earlier call with the same arguments has written all of it; nothing has been changed.
        ValueError, TypeError: a checkpoint that cannot be read, planned or split, naming file and tensor; a folder that
            holds something else. Of a matrix that cannot be split, what was written goes, unless several processes
            write.
        OSError: the disk is full, or fails.
        pissa.distributed.RankError: another process has failed.
    """
    begin = time.perf_counter()
    with distributed.failing_together(), Source.open(source) as found:
        plan = Plan.of(found, config, experts)
        plan.config.base_model_name_or_path = str(source)
        run = _Split(plan, Path(target), memory, torch.device(device))
        run.run(progressbar)
        need = {layer.name: run.in_flight(layer) for layer in plan.layers.values()}
        largest = max(need, key=need.__getitem__)
        return Initialised(
            layers=len(plan.layers),
            bytes_read=run.bytes_read,
            bytes_written=run.bytes_written,
            bytes_done_before=run.bytes_done_before,
            seconds=time.perf_counter() - begin,
            error=Errors.of(run.results).all,
            memory=max(memory, need[largest]),
            largest=largest,
            only_ours=plan.has_packed_experts,
        )


_NO_INFLUENCE = ("base_model_name_or_path", "runtime_config")


def _plain(value: Any) -> Any:
    """A field of a configuration as a value of JSON."""
    return sorted(value) if isinstance(value, set) else value


class _Unit(NamedTuple):
    """Layers whose factors share two tensors, or a tensor that is copied."""

    name: str
    layers: tuple[PlannedLayer, ...]
    factors: FactorTensors | None
    copied: str | None

    @property
    def tensors(self) -> list[str]:
        """Those of the checkpoint that it is made of."""
        return [self.copied] if self.copied else [name for layer in self.layers for name in layer.tensors]


class _Group(NamedTuple):
    """Layers that are split at once."""

    layers: list[PlannedLayer]
    finished: list[_Unit]
    """The units whose last layers these are."""

    @property
    def tensors(self) -> list[str]:
        """Those of the checkpoint that are read."""
        copied = [unit.copied for unit in self.finished if unit.copied]
        return [*(name for layer in self.layers for name in layer.tensors), *copied]


class _Split(Rewrite):
    """One run of `init`."""

    command = "init"

    def __init__(self, plan: Plan, target: Path, memory: int, device: torch.device) -> None:
        super().__init__(plan.source, target, layouts(plan), _units(plan))
        self.plan, self.memory, self.device = plan, memory, device
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._noted: dict[str, tuple[float, float, list[Any]]] = {}

    def identity(self) -> dict[str, Any]:
        config = self.plan.config
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        return {
            **{name: _plain(value) for name, value in fields.items() if name not in _NO_INFLUENCE},
            "experts": self.plan.experts,
            "device": self.device.type,
            "target": str(self.target),
        }

    def groups(self, units: Sequence[_Unit]) -> Iterator[_Group]:
        """The layers of the units, in order, in groups that stay within the memory, or of a single layer."""
        limit = _GROUP * torch.get_num_threads()
        group, size, elements = _Group([], []), 0, 0
        for unit in units:
            for layer in unit.layers:
                need, count = self.in_flight(layer), math.prod(layer.shape)
                if group.layers and (size + need > self.memory or elements + count > limit):
                    yield group
                    group, size, elements = _Group([], []), 0, 0
                group.layers.append(layer)
                size += need
                elements += count
            group.finished.append(unit)
        yield group

    def write(self, out: Output, group: _Group) -> dict[str, Result]:
        if group.layers:
            self._split(out, group.layers)
        results: dict[str, Result] = {}
        for unit in group.finished:
            results[unit.name] = {}
            if unit.factors is not None:
                pairs = [self._factors.pop(layer.name) for layer in unit.layers]
                for key, tensor in unit.factors.pack(pairs).items():
                    out.write(INITIAL_WEIGHTS, key, tensor)
                noted = {layer.name: self._noted.pop(layer.name) for layer in unit.layers}
                results[unit.name] = {
                    "lost": sum(lost for lost, _, _ in noted.values()),
                    "whole": sum(whole for _, whole, _ in noted.values()),
                    "records": {name: record for name, (_, _, record) in noted.items()},
                }
            if unit.copied is not None:
                self.copy(out, unit.copied)
        return results

    def _split(self, out: Output, layers: Sequence[PlannedLayer]) -> None:
        """Splits these layers, writes their residuals, and keeps their start factors, on the CPU."""
        weights = {layer.name: layer.matrix(self.source).to(self.device) for layer in layers}
        for form in dict.fromkeys(layer.form for layer in layers):
            these = [layer for layer in layers if layer.form == form]
            config, names = self.plan.config_of(these[0]), [layer.name for layer in these]
            some = [weights[name] for name in names]
            try:
                starts = start_factors(StartTask(some, [layer.origin for layer in these], config, names))
            except ValueError as error:
                raise ValueError(f"{_places(self.plan, these)}: {error}") from error
            residuals = residuals_of(some, starts, form, names)
            of_weights = read([fingerprint(weight) for weight in some])
            of_residuals = read([fingerprint(*tensors_of(residual).values()) for residual in residuals])
            of_starts = read([fingerprint(*start_tensors(start)) for start in starts])
            for i, (layer, weight, start, residual) in enumerate(zip(these, some, starts, residuals, strict=True)):
                self.write_layer(out, layer, residual)
                if has_taken(config):
                    for name, values in taken_tensors(layer, start).items():
                        out.write(PISSA_WEIGHTS, name, values)
                record = [of_weights[i], of_residuals[i], of_starts[i], start.rank_taken or None]
                self._noted[layer.name] = (*_sampled_error(weight, residual, start), record)
                self._factors[layer.name] = start.a0.cpu(), start.b0.cpu()

    def end(self, out: Output) -> None:
        plan = self.plan
        plan.lora.base_model_name_or_path = str(self.target)
        noted = {name: record for result in self.results.values() for name, record in result.get("records", {}).items()}
        records = {}
        for name, layer in plan.layers.items():
            weight, stored, start, taken = noted[name]
            records[name] = LayerRecord(
                layer.origin.r, layer.origin.scaling, weight, layer.form, stored=stored, start=start, taken=taken
            )
        packed = [layer for layer in plan.layers.values() if layer.is_packed]
        self.write_config(out, packed, plan.dense_linears, experts=plan.has_packed_experts)
        out.path(INITIAL_CONFIG).write_text(lora_config_text(plan.lora, plan.model_type))
        out.path(PISSA_RECORD).write_text(AdapterRecord(plan.config, records).text())

    def in_flight(self, layer: PlannedLayer) -> int:
        """Bytes that a layer takes while it is split, beside the mapped file."""
        config = self.plan.config_of(layer)
        elements, sides, r = math.prod(layer.shape), sum(layer.shape), layer.origin.r
        method = INIT_METHODS[config.init]
        size = 4 * sides * (r + _sketch(r, config))
        is_view = len(layer.parts) == 1 and not layer.parts[0].transposed
        size += 0 if is_view else elements * layer.dtype.itemsize
        size += sum(math.prod(shape) * dtype.itemsize for dtype, shape in layer.written.values())
        if method.copies or config.quant_iters > 1:
            size += 8 * elements
        if config.svd == "exact" or method.name in ("pissa_medium", "pissa_minor", "olora"):
            size += 16 * elements
        return size


def _units(plan: Plan) -> list[_Unit]:
    """All units, in the order in which their first tensors lie in the files."""
    places = {name: number for number, name in enumerate(plan.source.names)}
    found = []
    for factors in plan.factors:
        layers = tuple(plan.layers[name] for name in factors.layers)
        found.append(_Unit(factors.keys[0], layers, factors, None))
    found += [_Unit(f"copy {name}", (), None, name) for name in plan.copied]
    return sorted(found, key=lambda unit: places[unit.tensors[0]])


def _sketch(r: int, config: PissaConfig) -> int:
    """Columns of the bases that a decomposition keeps, about."""
    passes = 14 if config.svd_passes == "auto" else config.svd_passes
    return (r + 16) * (passes // 2 + 1)


def _places(plan: Plan, layers: Sequence[PlannedLayer]) -> str:
    """The files in which layers lie, for messages."""
    paths = dict.fromkeys(str(plan.source.entry(name).path) for layer in layers for name in layer.tensors)
    return ", ".join(paths)


# ---- The error -------------------------------------------------------------------------------------------------------


def _sampled_error(weight: Tensor, residual: Tensor | ops.QuantizedWeight, start: StartFactors) -> tuple[float, float]:
    """‖W - Q - s B0 A0‖² and ‖W‖² of the first rows."""
    rows = min(len(weight), max(16, len(weight) // _SAMPLE))
    some = weight[:rows].float()
    kept = residual[:rows].float() if isinstance(residual, Tensor) else ops.dequantize(_first_rows(residual, rows))
    rest = torch.addmm(some - kept, start.b0[:rows], start.a0, alpha=-start.origin.scaling)
    return float(torch.linalg.vector_norm(rest)) ** 2, float(torch.linalg.vector_norm(some)) ** 2


def _first_rows(weight: ops.QuantizedWeight, rows: int) -> ops.QuantizedWeight:
    shape = (rows, weight.shape[1])
    tensors = FORMATS[weight.format].tensors(shape, weight.blocksize, weight.nested)
    count = {name: size[0] for name, (size, _) in tensors.items() if size}
    nested = None if weight.nested_absmax is None else weight.nested_absmax[: count["nested_absmax"]]
    codes, absmax = weight.codes[: count["codes"]], weight.absmax[: count["absmax"]]
    return weight._replace(codes=codes, absmax=absmax, nested_absmax=nested, shape=shape)
