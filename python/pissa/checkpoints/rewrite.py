"""Rewrites a checkpoint on disk, a few matrices at a time: the one engine of `init`, `merge` and the exports."""

from __future__ import annotations

import json
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from tqdm import tqdm
from transformers.utils import CHAT_TEMPLATE_DIR

from pissa import distributed, ops
from pissa.base.bitsandbytes_state import quantization_config, to_bitsandbytes
from pissa.checkpoints.output import Output
from pissa.checkpoints.plan import Layer, Plan, Unit
from pissa.files.model_folder import CONFIG, parts_of, read_config
from pissa.files.pissa_layout import PISSA_RECORD
from pissa.files.tensor_file import INDEX

BATCH = 1 << 30
"""Bytes of the checkpoint behind which a run notes what is done: a killed run does at most so many again, and several
processes share out so many at a time."""

Result = dict[str, Any]
"""What is noted of a unit, an object of JSON: "lost" and "whole", ‖Q - W‖² and ‖W‖² of its layers, where Q is written
in the place of W, and what the command needs besides. Nothing of a tensor that is copied."""


class Rewrite(ABC):
    """One run over a checkpoint, of this process. All ranks make it, and call `run` together."""

    command: ClassVar[str]
    """What the bar and the identity call it."""

    def __init__(self, plan: Plan, target: Path) -> None:
        self.plan, self.source, self.target = plan, plan.source, target
        self._sizes = {
            unit.name: sum(self.source.entry(name).nbytes for name in set(unit.tensors)) for unit in plan.units
        }
        self.results: dict[str, Result] = {}
        """Of the units that are done, by name."""
        self.bytes_read = sum(self._sizes.values())
        """Of the checkpoint; by this run and by those that it goes on with."""
        self.bytes_written = sum(layout.size for layout in plan.files.values())
        self.bytes_done_before = 0
        """Of the checkpoint, by runs that this one goes on with."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What has influence on the bytes, beside the source: a value of JSON for each thing."""

    def groups(self, units: Sequence[Unit]) -> Iterable[Any]:
        """What is read and computed at once, with its `tensors`: each unit, or several, or a part of one."""
        return units

    @abstractmethod
    def write(self, out: Output, group: Any) -> dict[str, Result]:
        """Computes and writes a group. The results of the units whose last part it is."""

    def end(self, out: Output) -> None:  # noqa: B027  most have nothing else to write
        """Writes what depends on all units, beside config.json and the index; one rank does."""

    def run(self, progressbar: bool) -> None:
        """Writes all files.

        Raises:
            CompletedError: an earlier run has written all of it; nothing has been changed.
            ValueError: a unit cannot be written. What is written then goes, unless several processes write.
            OSError: the disk is full, or fails.
        """
        batches = self._batches()
        sizes = {name: sum(self._sizes[unit.name] for unit in units) for name, units in batches.items()}
        owners = distributed.owners(sizes)
        mine = [name for name in batches if owners[name] == distributed.rank()]
        with Output(self.target, self._identity(), self.plan.files) as out:
            for units in out.done.values():
                self.results |= units
            self.bytes_done_before = sum(sizes[name] for name in out.done)
            # tqdm reads TQDM_DISABLE only if it is not told whether to be disabled.
            hidden = {} if progressbar and distributed.rank() == 0 else {"disable": True}
            left = {name: batches[name] for name in mine if name not in out.done}
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
                self._write_config(out)
                self.end(out)
            out.finish()

    def _work(self, out: Output, batches: Mapping[str, Sequence[Unit]], bar: Any) -> None:
        groups = [(name, group) for name, units in batches.items() for group in self.groups(units)]
        lost, whole = (sum(result.get(name, 0.0) for result in self.results.values()) for name in ("lost", "whole"))
        for number, (name, group) in enumerate(groups):
            following = groups[number + 1] if number + 1 < len(groups) else None
            if following is not None:
                self.source.ahead(following[1].tensors)
            try:
                found = self.write(out, group)
            except ValueError:
                if distributed.world_size() == 1:
                    out.discard()
                raise
            self.source.release(group.tensors)
            self.results |= found
            if following is None or following[0] != name:
                out.add(name, {unit.name: self.results[unit.name] for unit in batches[name]})
            for unit, result in found.items():
                lost, whole = lost + result.get("lost", 0.0), whole + result.get("whole", 0.0)
                bar.update(self._sizes[unit])
            if whole:
                bar.set_postfix_str(f"error {math.sqrt(lost / whole):.3%}", refresh=False)

    def _batches(self) -> dict[str, list[Unit]]:
        """The units, by the names of the batches: numbers, in the order of the files."""
        found: list[list[Unit]] = []
        size = BATCH
        for unit in self.plan.units:
            if size >= BATCH:
                found.append([])
                size = 0
            found[-1].append(unit)
            size += self._sizes[unit.name]
        return {f"{number:06}": units for number, units in enumerate(found)}

    def _identity(self) -> dict[str, Any]:
        return {
            "command": self.command,
            "pissa": ops.build_info()["version"],
            **self.identity(),
            **{f"source {name}": value for name, value in self.source.identity().items()},
        }

    def write_layer(self, out: Output, layer: Layer, weight: Tensor | ops.QuantizedWeight) -> None:
        """Writes the matrix [out, in] of a layer: codes as bitsandbytes' entries, a dense one in the places of its
        parts, or in that of codes."""
        if isinstance(weight, ops.QuantizedWeight):
            for name, values in to_bitsandbytes(weight, layer.dtype).items():
                out.write(self.file_of(layer.parts[0].tensor), f"{layer.target}.{name}", values)
        elif layer.entries:
            tensor = layer.parts[0].tensor
            out.write(self.file_of(tensor), tensor, weight)
        else:
            for name, values, member in parts_of(weight, layer.parts, self.source):
                out.write(self.file_of(name), name, values, member)

    def copy(self, out: Output, tensor: str) -> None:
        """Writes a tensor as it is."""
        out.write(self.file_of(tensor), tensor, self.source.read(tensor))

    def file_of(self, tensor: str) -> str:
        """The new file that has the place of a tensor of the checkpoint."""
        return self.source.path_of(tensor).name

    def _copy_small_files(self, out: Output) -> None:
        """Copies the files beside the weights and config.json: tokenizer, templates, card; and writes the index."""
        folder = self.source.folder
        paths = [path for path in folder.iterdir() if path.name not in (CONFIG, INDEX, PISSA_RECORD)]
        paths += [path for name in _FOLDERS for path in folder.glob(f"{name}/**/*")]
        for path in paths:
            if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS):
                shutil.copyfile(path, out.path(path.relative_to(folder).as_posix()))
        if self.source.index is not None:
            out.path(INDEX).write_text(self._index())

    def _index(self) -> str:
        shards = {path.name: self.plan.files[path.name] for path in self.source.paths}
        size = sum(layout.size - len(layout.header) for layout in shards.values())
        places = {tensor: name for name, layout in shards.items() for tensor in layout.entries}
        return (
            json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"
        )

    def _write_config(self, out: Output) -> None:
        """Writes config.json, with what transformers has to know of packed layers; see `quantization_config`."""
        config, packed = read_config(self.source.folder), self.plan.packed
        was_packed = config.pop("quantization_config", None) is not None
        if packed:
            form, dtype, experts = packed[0].form, packed[0].dtype, self.plan.has_packed_experts
            config["quantization_config"] = quantization_config(form, dtype, self.plan.dense_linears, experts=experts)
        if packed or was_packed:
            out.path(CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        else:
            shutil.copyfile(self.source.folder / CONFIG, out.path(CONFIG))


class Errors(NamedTuple):
    """What was lost in the units that are not written as they were."""

    error: float
    """‖Q - W‖ / ‖W‖ over all of them."""
    worst: str | None
    """The unit of the largest error; None if there is none."""
    error_of_worst: float
    mean_error: float
    """Of the units, each by itself."""

    @staticmethod
    def of(results: Mapping[str, Result]) -> Errors:
        found = {name: (result["lost"], result["whole"]) for name, result in results.items() if result.get("whole")}
        each = {name: math.sqrt(lost / whole) for name, (lost, whole) in found.items()}
        lost, whole = (sum(column) for column in zip(*found.values(), strict=True)) if found else (0.0, 1.0)
        worst = max(each, key=each.__getitem__, default=None)
        return Errors(
            math.sqrt(lost / whole), worst, each[worst] if worst else 0.0, sum(each.values()) / max(1, len(each))
        )


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
"""The endings of what holds, or lists, the weights of a model."""

_FOLDERS = (CHAT_TEMPLATE_DIR, "*_tokenizer")
"""What transformers makes folders of: named chat templates, and the further tokenizers of a processor. Any other folder
is somebody else's: .git and .cache, original/ with the weights of another program, checkpoints of a training."""
