"""Rewrites a checkpoint on disk, a few matrices at a time: plans the change of each tensor, from names and shapes only.
The engine is shared by `init`, `merge` and the exports."""

from __future__ import annotations

import json
import math
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D
from transformers.utils import CHAT_TEMPLATE_DIR

from pissa import distributed, ops
from pissa.adapters.peft_layout import FactorTensors
from pissa.adapters.pissa_layout import ADAPTER_FILES
from pissa.base.bitsandbytes_state import entry_layout, quantization_config, to_bitsandbytes
from pissa.base.classes import base_of
from pissa.checkpoints.output import Output
from pissa.config import IMPLICIT, Form
from pissa.containers.checkpoint import RESIDUAL_KEY, Checkpoint
from pissa.containers.messages import quote
from pissa.containers.model_folder import Part
from pissa.containers.recognise import CONFIG
from pissa.containers.staged import write_text
from pissa.containers.tensor_file import INDEX, WEIGHT_FILES, Layout
from pissa.ops.checks import FLOATS
from pissa.ops.formats import FORMATS

_Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtypes and shapes, by name."""


@dataclass(frozen=True)
class LayerPlan:
    """How a layer of a checkpoint is rewritten."""

    name: str
    """The name in the model. Each matrix of fused experts is a layer."""
    parts: tuple[Part, ...]
    """The parts of its matrix [out, in], stacked by rows."""
    shape: tuple[int, int]
    dtype: torch.dtype
    """The dtype of the dense weight."""
    form: Form = IMPLICIT
    """The form in which it is written: codes if the form is a format, otherwise dense."""
    is_expert: bool = False
    """Whether it belongs to a fused weight."""
    transposed: bool = False
    """Whether the module's own weight is [in, out]."""
    own_key: str | None = None
    """The adapter's tensor on which it was trained instead of the checkpoint's weight."""
    mirrored: bool = False
    """Whether the factors in the adapter's file are those of the transposed matrix."""

    @property
    def tensors(self) -> list[str]:
        """The tensors of the checkpoint from which it is read."""
        return [part.tensor for part in self.parts]

    @property
    def is_packed(self) -> bool:
        """Whether it is written in codes."""
        return self.form.name in FORMATS

    @property
    def target(self) -> str:
        """The name of its module in the new checkpoint, if it is written in codes. transformers finds modules by the
        checkpoint's own names, unless it has assembled them from several."""
        part = self.parts[0]
        own = part.tensor.removesuffix(".weight")
        is_own = len(self.parts) == 1 and part.member is None and own != part.tensor and not self.is_expert
        return own if is_own else self.name

    @property
    def written(self) -> _Tensors:
        """The tensors in which it is written, if its form changes."""
        if not self.is_packed:
            return {self.parts[0].tensor: (self.dtype, self.shape)}
        entries = entry_layout(self.form, self.shape, self.dtype)
        return {f"{self.target}.{name}": layout for name, layout in entries.items()}


@dataclass(frozen=True)
class Copy:
    """A tensor that stays as it is."""

    tensor: str

    @property
    def name(self) -> str:
        return f"copy {self.tensor}"

    @property
    def tensors(self) -> list[str]:
        return [self.tensor]


@dataclass(frozen=True)
class Replace:
    """A tensor that was trained in addition to the layers, as a whole or in part."""

    name: str
    """The name in the model."""
    tensor: str
    """The name in the checkpoint."""
    key: str
    """The adapter's tensor that replaces it."""
    rows: tuple[int, ...] | None = None
    """The rows that the adapter's tensor replaces, if not all."""
    scaling: float | None = None
    """If given, the adapter's tensor is added with this factor."""

    @property
    def tensors(self) -> list[str]:
        return [self.tensor]


@dataclass(frozen=True)
class Layers:
    """All layers of a factor pair, which are several for fused experts, or a layer without any factors."""

    name: str
    layers: tuple[LayerPlan, ...]
    factors: FactorTensors | None = None

    @property
    def tensors(self) -> list[str]:
        return list(dict.fromkeys(tensor for layer in self.layers for tensor in layer.tensors))

    def in_forms(self, forms: Mapping[str, Form]) -> Layers:
        """The same layers, written in the forms by their names, and the others dense."""
        layers = tuple(replace(layer, form=forms.get(layer.name, IMPLICIT)) for layer in self.layers)
        return replace(self, layers=layers)


Unit = Copy | Replace | Layers
"""What is processed and recorded together, by its name: one change of the checkpoint, made from its `tensors`."""


class Plan:
    """How a run changes a checkpoint.

    Args:
        units: the changes. Everything else is copied.
        others: additional safetensors files, by their names in the folder.
        kept: weights in codes that stay in the same codes; those that a unit names get other codes. All other weights
            in codes are written decoded.
    """

    def __init__(
        self,
        source: Checkpoint,
        units: Iterable[Unit],
        others: Mapping[str, Layout] | None = None,
        kept: Collection[str] = (),
    ) -> None:
        self.source, self.kept = source, kept
        names = [*source.names, *(source.input_scales if kept else ())]
        changes = list(units)
        changed = {tensor for unit in changes for tensor in unit.tensors}
        self.copied = [name for name in names if name not in changed]
        """The tensors that no unit changes."""
        places = {name: number for number, name in enumerate(names)}
        self.units: list[Unit] = [*changes, *map(Copy, self.copied)]
        """The units in the order of the files, including one for each tensor that is copied."""
        self.units.sort(key=lambda unit: min(places[tensor] for tensor in unit.tensors))
        of_layers = [unit for unit in self.units if isinstance(unit, Layers)]
        self.adapted = [unit for unit in of_layers if unit.factors is not None]
        """The layers that an adapter changes."""
        self.layers = {layer.name: layer for unit in of_layers for layer in unit.layers}
        """All layers, by name."""
        self.packed = [layer for layer in self.layers.values() if layer.is_packed]
        """The layers that are written in codes."""
        self.has_packed_experts = any(layer.is_expert for layer in self.packed)
        """Whether some of these belong to fused experts, which only pissa reads."""
        self.dense_linears = self._dense_linears() if self.packed else []
        """The linear layers of the model that are dense in the new checkpoint. config.json lists them if others are in
        codes."""
        self.files = self._shards(names) | dict(others or {})
        """The safetensors files that a run writes. Those of the checkpoint keep their names."""

    def _dense_linears(self) -> list[str]:
        in_codes = {layer.name for layer in self.packed}
        if self.kept:
            layers = self.source.coded_layers.items()
            in_codes |= {name for name, parts in layers if all(part.tensor in self.kept for part in parts)}
        modules = self.source.model.named_modules()
        linears = [name for name, module in modules if base_of(module).module_class in (nn.Linear, Conv1D)]
        return [name for name in linears if name not in in_codes]

    def _shards(self, names: Sequence[str]) -> dict[str, Layout]:
        """The safetensors files for these tensors of the checkpoint. Every tensor has the same position as in the old
        file. The new tensors of a layer that is written in codes are at the position of the first old one."""
        source, new = self.source, dict[str, _Tensors]()
        for name in names:
            if name in self.kept:
                entries = {tensor: source.stored.entry(tensor) for tensor in source.stored_as(name)}
            else:
                entries = {name: source.entry(name)}
            new[name] = {tensor: (entry.dtype, entry.shape) for tensor, entry in entries.items()}
        new |= {tensor: {} for layer in self.packed for tensor in layer.tensors}
        for layer in self.packed:  # a stack's layers are at the same tensor
            new[layer.tensors[0]] |= layer.written
        files: dict[str, _Tensors] = {source.stored.written_as(path): {} for path in source.stored.paths}
        for name, tensors in new.items():
            files[source.stored.written_as(source.path_of(name))] |= tensors
        return {name: Layout(tensors) for name, tensors in files.items()}


def matrix_shape(
    name: str, parts: Sequence[Part], source: Checkpoint, dimensions: int = 2
) -> tuple[tuple[int, int], torch.dtype]:
    """The shape of the matrix [out, in] that a layer's parts make, and their dtype. `dimensions` is the number of
    dimensions of the parts, which is more than 2 for a convolution."""
    entries = [source.entry(part.tensor) for part in parts]
    rows, columns = 0, set()
    for part, entry in zip(parts, entries, strict=True):
        shape = entry.shape if part.member is None else entry.shape[1:]
        is_member = part.member is None or part.member < entry.shape[0]
        if entry.dtype not in FLOATS or entry.dtype != entries[0].dtype or len(shape) != dimensions or not is_member:
            raise ValueError(
                f"{source.path_of(part.tensor)}: tensor {quote(part.tensor)} of layer {name} is {entry.dtype} "
                f"{list(entry.shape)}; needed: float32, bfloat16 or float16, one for a layer, and {dimensions} "
                "dimensions for a matrix"
            )
        out, inner = (shape[1], shape[0]) if part.transposed else (shape[0], math.prod(shape[1:]))
        rows += out
        columns.add(inner)
    if len(columns) > 1:
        raise ValueError(f"layer {name} is made of tensors with {sorted(columns)} columns; needed: one number")
    return (rows, columns.pop()), entries[0].dtype


MODELOPT_CONFIG = "hf_quant_config.json"
"""The file in which ModelOpt declares a checkpoint's quantisation a second time."""

BATCH = 1 << 30
"""The bytes of the checkpoint after which a run records what is done. A killed run repeats at most this much, and
several processes divide the work in portions of this size."""

Result = dict[str, Any]
"""What is recorded for a unit, as a JSON object: "error_squared" and "norm_squared", ‖Q - W‖² and ‖W‖² of its layers,
where Q is written instead of W, and what else the command needs. Nothing is recorded for a tensor that is copied."""


def square(values: Tensor) -> float:
    """The sum of the squares."""
    return float(torch.linalg.vector_norm(values)) ** 2


def add_up(results: Iterable[Result]) -> Result:
    """The sums of the numbers in the results."""
    sums = Counter[str]()
    for result in results:
        sums.update(result)
    return dict(sums)


def relative_error(results: Iterable[Result]) -> float:
    """‖Q - W‖ / ‖W‖ over the layers that are not written unchanged, where Q is written instead of W, as far as their
    results have both."""
    pairs = [(result["error_squared"], result["norm_squared"]) for result in results if "norm_squared" in result]
    norm_squared = sum(norm for _, norm in pairs)
    return math.sqrt(sum(error for error, _ in pairs) / norm_squared) if norm_squared else 0.0


@dataclass(frozen=True)
class Written:
    """What a run has written."""

    error: float
    """The `relative_error` of everything."""
    bytes_written: int
    """The size of all files, those of earlier runs that this one continued included."""


class Rewrite(ABC):
    """One run over a checkpoint in this process. All ranks create it, and call `run` together."""

    command: ClassVar[str]
    """Its name in the bar and in the identity."""
    not_copied: ClassVar[Collection[str]] = (CONFIG, MODELOPT_CONFIG, INDEX)
    """The small files of the source that are not copied, besides those of an adapter that was saved there."""

    def __init__(self, plan: Plan, target: Path) -> None:
        self.plan, self.source, self.target = plan, plan.source, target
        self._sizes = {unit.name: sum(self.source.nbytes(name) for name in set(unit.tensors)) for unit in plan.units}
        self.results: dict[str, Result] = {}
        """The results of the finished units, by name."""
        self.units_to_write: list[Unit] = []
        """The units that this process writes. Earlier runs have written others, and other processes write others."""
        self.bytes_written = sum(layout.size for layout in plan.files.values())

    @property
    def lacks_start(self) -> bool:
        """Whether the new checkpoint lacks factors that an adapter adds, so that no other adapter may start on it."""
        return False

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything except the source that affects the bytes: a JSON value for each thing."""

    def groups(self, units: Sequence[Unit]) -> Iterable[Any]:
        """Yields what is read and computed together, with its `tensors`: each unit, several units, or a part of one."""
        return units

    @abstractmethod
    def write(self, out: Output, group: Any) -> dict[str, Result]:
        """Computes and writes a group. Returns the results of the units that end with it."""

    def end(self, out: Output) -> None:  # noqa: B027  most have nothing else to write
        """Writes what depends on all units, besides config.json and the index. Runs on one rank."""

    def check_target(self) -> None:
        """Raises the ValueErrors of `run` that the new folder causes, as far as they are known before it is written."""
        Output(self.target, self._identity(), self.plan.files).check()

    def run(self, progressbar: bool) -> Written:
        """Writes all files.

        Raises:
            CompletedError: an earlier run has written everything; nothing has been changed.
            ValueError: a unit cannot be written. What was written is then removed, unless several processes write.
            OSError: a file cannot be read or written now, or the disk is full. What was written stays, and the same
                call goes on.
        """
        batches = self._batches()
        sizes = {name: sum(self._sizes[unit.name] for unit in units) for name, units in batches.items()}
        owners = distributed.owners(sizes)
        mine = [name for name in batches if owners[name] == distributed.rank()]
        with Output(self.target, self._identity(), self.plan.files) as out:
            for units in out.done.values():
                self.results |= units
            # tqdm reads TQDM_DISABLE only if `disable` is not given.
            hidden = {} if progressbar and distributed.rank() == 0 else {"disable": True}
            left = {name: batches[name] for name in mine if name not in out.done}
            self.units_to_write = [unit for units in left.values() for unit in units]
            with tqdm(
                total=sum(sizes[name] for name in mine),
                initial=sum(sizes[name] for name in mine if name in out.done),
                desc=f"PiSSA {self.command}",
                unit="B",
                unit_scale=True,
                unit_divisor=1000,
                **hidden,
            ) as bar:
                self._work(out, left, bar)
            for others in distributed.agree(self.results):
                self.results |= others
            if distributed.rank() == 0:
                self._copy_small_files(out)
                self.write_config(out)
                self.end(out)
            out.finish()
        return Written(relative_error(self.results.values()), self.bytes_written)

    def _work(self, out: Output, batches: Mapping[str, Sequence[Unit]], bar: Any) -> None:
        groups = [(name, group) for name, units in batches.items() for group in self.groups(units)]
        for number, (name, group) in enumerate(groups):
            next_group = groups[number + 1] if number + 1 < len(groups) else None
            if next_group is not None:
                self.source.ahead(next_group[1].tensors)
            try:
                finished = self.write(out, group)
            except ValueError:  # an OSError may be gone the next time
                if distributed.world_size() == 1:
                    out.discard()
                raise
            self.source.release(group.tensors)
            self.results |= finished
            if next_group is None or next_group[0] != name:
                out.add(name, {unit.name: self.results[unit.name] for unit in batches[name]})
            bar.update(sum(self._sizes[unit] for unit in finished))

    def _batches(self) -> dict[str, list[Unit]]:
        """The units by the names of the batches, which are numbers in the order of the files."""
        batches: list[list[Unit]] = []
        size = BATCH
        for unit in self.plan.units:
            if size >= BATCH:
                batches.append([])
                size = 0
            batches[-1].append(unit)
            size += self._sizes[unit.name]
        return {f"{number:06}": units for number, units in enumerate(batches)}

    def _identity(self) -> dict[str, Any]:
        return {
            "command": self.command,
            "pissa": ops.build_info()["version"],
            **self.identity(),
            **{f"source {name}": value for name, value in self.source.stored.identity().items()},
        }

    def write_layer(self, out: Output, layer: LayerPlan, weight: Tensor | ops.QuantizedWeight) -> None:
        """Writes the matrix [out, in] of a layer: codes as bitsandbytes' entries, a dense matrix in place of its parts
        or of codes."""
        if isinstance(weight, ops.QuantizedWeight):
            for name, values in to_bitsandbytes(weight, layer.dtype).items():
                out.write(self.file_of(layer.parts[0].tensor), f"{layer.target}.{name}", values)
        else:
            for name, values, member in self.source.divide(weight, layer.parts):
                out.write(self.file_of(name), name, values, member)

    def copy(self, out: Output, tensor: str) -> None:
        """Copies a tensor of the checkpoint, in its codes if the plan keeps them."""
        if tensor not in self.plan.kept:
            out.write(self.file_of(tensor), tensor, self.source.read(tensor))
            return
        for stored in self.source.stored_as(tensor):
            out.write(self.file_of(tensor), stored, self.source.stored.read(stored))

    def file_of(self, tensor: str) -> str:
        """The new file that corresponds to a tensor of the checkpoint."""
        return self.source.stored.written_as(self.source.path_of(tensor))

    def _copy_small_files(self, out: Output) -> None:
        """Copies the files other than weights and config.json (tokenizer, templates, card), and writes the index."""
        with self.source.small_files() as folder:
            paths = [path for path in folder.iterdir() if path.name not in (*self.not_copied, *ADAPTER_FILES)]
            paths += [path for name in _FOLDERS for path in folder.glob(f"{name}/**/*")]
            for path in paths:
                if path.is_file() and not path.name.startswith(".") and not path.name.endswith(WEIGHT_FILES):
                    shutil.copyfile(path, out.path(path.relative_to(folder).as_posix()))
        if self.source.stored.index is not None:
            write_text(out.path(INDEX), self._index())

    def _index(self) -> str:
        names = [self.source.stored.written_as(path) for path in self.source.stored.paths]
        shards = {name: self.plan.files[name] for name in names}
        size = sum(layout.size - len(layout.header) for layout in shards.values())
        places = {tensor: name for name, layout in shards.items() for tensor in layout.entries}
        return (
            json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"
        )

    def write_config(self, out: Output) -> None:
        """Writes config.json, with the entries for packed layers that transformers needs; see `quantization_config`."""
        config, packed = dict(self.source.config), self.plan.packed
        for name in ("quantization_config", RESIDUAL_KEY):
            config.pop(name, None)
        if self.lacks_start:
            config[RESIDUAL_KEY] = True
        if packed:
            form, dtype, experts = packed[0].form, packed[0].dtype, self.plan.has_packed_experts
            config["quantization_config"] = quantization_config(form, dtype, self.plan.dense_linears, experts=experts)
        if config != self.source.config or self.source.files:
            write_text(out.path(CONFIG), json.dumps(config, indent=2) + "\n")
        else:
            shutil.copyfile(self.source.folder / CONFIG, out.path(CONFIG))


_FOLDERS = (CHAT_TEMPLATE_DIR, "*_tokenizer")
"""The folders that transformers creates: named chat templates, and the additional tokenizers of a processor. Any other
folder belongs to another program: .git and .cache, original/ with its weights, checkpoints of a training."""
