"""Merges an adapter into a checkpoint on disk, a matrix at a time. The trained model becomes a checkpoint of its own:
dense, in bitsandbytes' formats, or in the codes of the base. What cannot be merged is refused before anything is
written."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pissa import ops
from pissa.adapters.lora_folder import LoraFactors, LoraFolder, open_adapter
from pissa.adapters.peft_layout import MAGNITUDE, PREFIX, base_weight_key, is_mirrored
from pissa.base.classes import adopt, is_linear
from pissa.checkpoints.load import of_layer
from pissa.checkpoints.merge_codes import Kept, check_low_rank, coded_units, merged_layers, moments_of
from pissa.checkpoints.output import Output
from pissa.checkpoints.rewrite import (
    Copy,
    LayerPlan,
    Layers,
    Plan,
    Replace,
    Result,
    Rewrite,
    Unit,
    Written,
    add_up,
    matrix_shape,
    square,
)
from pissa.checkpoints.trained import TrainedWeights, read_adapter
from pissa.config import IMPLICIT, Form
from pissa.containers.checkpoint import READ, Checkpoint, Contents
from pissa.containers.messages import quote
from pissa.containers.model_folder import Part
from pissa.containers.tensor_file import INDEX
from pissa.model.batches import Batch, digest_of
from pissa.ops.checks import check_choice
from pissa.ops.formats import FORMATS


def plan_merge(source: Checkpoint, adapter: LoraFolder, form: Form = IMPLICIT, kept: Collection[str] = ()) -> Plan:
    """The plan of a merge. The linear layers, except the output layer, are written in `form`, where IMPLICIT means
    dense. `kept`: see `Plan`. Raises ValueError for anything that cannot be merged, which is named."""
    planner = UnitPlanner(source, adapter)
    adapted = [planner.unit_of(factors) for factors in adapter.factors.values()]
    names, forms = {layer.name for unit in adapted for layer in unit.layers}, dict[str, Form]()
    if form != IMPLICIT:  # as in transformers, which quantises no output layer
        output = source.model.get_output_embeddings()
        linears = (name for name, module in source.model.named_modules() if module is not output and is_linear(module))
        forms = {name: form for name in linears if not source.tied(f"{name}.weight")}
    adapted += [Layers(name, (planner.layer(name),)) for name in forms.keys() - names]
    units: list[Unit] = [unit.in_forms(forms) for unit in adapted]
    units += planner.beside_factors(names)
    _check_changed_once(source, units)
    _check_located(source)
    return Plan(source, units, kept=kept)


def _check_changed_once(source: Checkpoint, units: Sequence[Unit]) -> None:
    changed = Counter(tensor for unit in units for tensor in unit.tensors)
    for tensor in [tensor for tensor, count in changed.items() if count > 1]:
        twice = " and ".join(unit.name for unit in units if tensor in unit.tensors)
        raise ValueError(f"{source.path_of(tensor)}: tensor {quote(tensor)} is changed for {twice}; {_IN_MEMORY}")


def _check_located(source: Checkpoint) -> None:
    """Refuses codes that belong to no parameter of the model that transformers builds."""
    located = {tensor for name in source.tensors for tensor in source.composition.tensors(name)}
    if left := sorted(source.coded.keys() - located):
        raise ValueError(
            f"{source.path_of(left[0])}: tensor {quote(left[0])} is a part of codes that only pissa.load reads; "
            f"{_IN_MEMORY}"
        )


class UnitPlanner:
    """Finds the parts of a checkpoint that an adapter changes. Every layer is dense."""

    def __init__(self, source: Checkpoint, adapter: LoraFolder) -> None:
        self.source, self.adapter = source, adapter

    # -- layers

    def unit_of(self, factors: LoraFactors) -> Layers:
        """The layers of a target of the adapter; raises the errors of `plan_merge`."""
        layers = self._experts(factors) if factors.is_fused else (self._adapted(factors),)
        needed = (factors.out, math.prod(factors.row))
        if layers[0].shape != (needed[::-1] if layers[0].mirrored else needed):
            raise ValueError(
                f"layer {layers[0].name} is {list(layers[0].shape)} in {self.source.folder}, and its factors in "
                f"{self.adapter.weights.path} are for {list(needed)}: it is not the base of the adapter [P092]"
            )
        return Layers(factors.target, layers, factors)

    def _adapted(self, factors: LoraFactors) -> LayerPlan:
        """The layer for factors that do not belong to fused experts."""
        name = factors.layers[0]
        module = self._module(name)
        try:
            base = adopt(module)
        except TypeError as error:
            raise ValueError(f"layer {name} is {error}; {_IN_MEMORY}") from None
        if base is None and factors.target == name:
            raise ValueError(f"layer {name} is a {type(module).__name__}, which is not known here; {_IN_MEMORY}")
        module_class = nn.Linear if base is None else base.module_class
        if others := self.source.tied(f"{name}.weight"):
            raise ValueError(
                f"layer {name} shares its weight with {others[0]}, which would change too; untie them in the "
                f"checkpoint first, or {_IN_MEMORY}"
            )
        if self.adapter.config["use_dora"] and module_class not in (nn.Linear, Conv1D):
            raise ValueError(
                f"layer {name} is a {type(module).__name__}, and use_dora is for linear layers; {_IN_MEMORY}"
            )
        key = base_weight_key(name)
        layer = self.layer(name, module_class in (Conv1D, nn.Embedding), module.weight.dim())
        return replace(layer, own_key=key if key in self.adapter.other_keys else None)

    def _experts(self, factors: LoraFactors) -> tuple[LayerPlan, ...]:
        key, (path, _, leaf) = factors.target, factors.target.rpartition(".")
        module = self._module(path)
        weights = getattr(module, leaf, None)
        if not isinstance(weights, nn.Parameter) or weights.dim() != 3 or len(weights) != len(factors.layers):
            raise ValueError(
                f"{self.adapter.weights.path} has factors of {len(factors.layers)} experts for {key}, which the model "
                f"in {self.source.folder} does not have"
            )
        with of_layer(key, self.source.folder):
            layers = self.source.layers_of(key)
        mirrored = is_mirrored(module)
        return tuple(
            LayerPlan(name, parts, *matrix_shape(name, parts, self.source), is_expert=True, mirrored=mirrored)
            for name, parts in layers.items()
        )

    def layer(self, name: str, transposed: bool = False, dimensions: int = 2) -> LayerPlan:
        """A layer whose weight has that number of dimensions; its matrix is [in, out] if `transposed`."""
        with of_layer(name, self.source.folder):
            parts = self.source.parts_of(f"{name}.weight", transposed)
            return LayerPlan(name, parts, *matrix_shape(name, parts, self.source, dimensions), transposed=transposed)

    def _module(self, name: str) -> Any:
        try:
            return self.source.model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"the model in {self.source.folder} has no layer {name}, which {self.adapter.weights.path} adapts: it "
                "is not the base of the adapter [P092]"
            ) from None

    # -- what the adapter contains in addition to factors

    def beside_factors(self, adapted: Collection[str]) -> list[Replace]:
        """The tensors that were trained in addition to the factors, or that PEFT has saved with them."""
        weights, units = self.adapter.weights, dict[str, Replace]()
        of_layers = {base_weight_key(name) for name in adapted}
        for key in self.adapter.other_keys:
            place, _, leaf = key.removeprefix(PREFIX).rpartition(".")
            if key in of_layers or MAGNITUDE in (leaf, place.rpartition(".")[2]):
                continue
            unit = self._beside(key, place, leaf)
            other = units.setdefault(unit.tensor, unit)
            if other is unit:
                continue
            are_whole = other.rows is unit.rows is None and other.scaling is unit.scaling is None
            if not (are_whole and torch.equal(weights.read(other.key), weights.read(key))):
                raise ValueError(
                    f"{weights.path}: tensors {quote(other.key)} and {quote(key)} are both for {unit.tensor} in "
                    f"{self.source.folder}; {_IN_MEMORY}"
                )
        return list(units.values())

    def _beside(self, key: str, place: str, leaf: str) -> Replace:
        """One such tensor. For a tied weight it must apply to all layers: the adapter has it for each, or
        it trains tokens of the input embeddings."""
        path, shape = self.adapter.weights.path, self.adapter.weights.entries[key].shape
        rows, scaling = None, None
        if leaf == "trainable_tokens_delta":
            place = place.removesuffix(".token_adapter")
            name, rows = f"{place}.weight", self._rows(place)
        elif place.endswith(".lora_B") and leaf == "bias":
            place = place.removesuffix(".lora_B")
            name, scaling = f"{place}.bias", self.adapter.factors[place].scaling
        else:
            name = f"{place.removesuffix('.base_layer').removesuffix('.token_adapter')}.{leaf}"
        if name not in self.source.tensors:
            raise ValueError(f"{path}: tensor {quote(key)} is for no tensor of the model in {self.source.folder}")
        with of_layer(name, self.source.folder):
            parts = self.source.parts_of(name)
        entry = self.source.entry(parts[0].tensor)
        needed = entry.shape if rows is None else (len(rows), *entry.shape[1:])
        if parts != (Part(parts[0].tensor),) or shape != needed or parts[0].tensor in self.source.coded:
            raise ValueError(
                f"{path}: tensor {quote(key)} is {list(shape)}; needed: {list(needed)}, for {parts[0].tensor} in "
                f"{self.source.folder}. An embedding that was resized, or a weight that is not one dense tensor of the "
                f"checkpoint, cannot be replaced there; {_IN_MEMORY}"
            )
        is_for_all = rows and self.source.tensors[name] is self.source.model.get_input_embeddings().weight
        saved = {name, *(other.removeprefix(PREFIX).replace(".base_layer.", ".") for other in self.adapter.other_keys)}
        if not is_for_all and (others := [other for other in self.source.tied(name) if other not in saved]):
            raise ValueError(
                f"{path}: tensor {quote(key)} is for {name}, which shares its values with {others[0]} in "
                f"{self.source.folder}; {_IN_MEMORY}"
            )
        return Replace(name, parts[0].tensor, key, rows, scaling)

    def _rows(self, place: str) -> tuple[int, ...]:
        """The rows of an embedding that are trained."""
        indices = self.adapter.config.get("trainable_token_indices")
        if isinstance(indices, dict):
            indices = next((value for name, value in indices.items() if f".{place}".endswith(f".{name}")), None)
        return tuple(indices or ())


_IN_MEMORY = "merge in memory, with PeftModel.from_pretrained or PissaModel.from_pretrained and merge_and_unload [P093]"


@dataclass(frozen=True)
class Merged(Written):
    """The result of `merge`. Its `error` is ‖Q - W'‖ / ‖W'‖ over the layers that are merged or written in codes, except
    for those of the base, where W' is the sum in float32 and Q the written weight."""

    what: str
    """The kind of the adapter, in words."""
    layers: int
    """The number of layers whose weights the adapter changes."""
    quantised: int
    """The number of layers that are written in codes."""
    error_of_change: float
    """‖Q - W'‖ / ‖change‖ over the layers that the adapter changes."""
    kept: Kept | None = None
    """What became of the change in the codes of the base."""
    kept_of_layers: dict[str, Kept] = field(default_factory=dict)
    """The same for each layer in codes, or all experts of a weight."""


SAME = "same"
"""The value of `quant` for the codes of the base."""


def merge(
    adapter: str | os.PathLike[str],
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    quant: str | None = None,
    calibration: Iterable[Batch] | None = None,
    progressbar: bool = False,
) -> Merged:
    """Writes the checkpoint `source`, a folder or a name on the Hub, with the adapter in folder `adapter` merged into
    it, to `target`.

    Each matrix W is read from the mapped file, W + s (B A - B0 A0) is summed in float32, rounded once to the dtype of
    the checkpoint, and written. Everything that the adapter does not change is copied. On a dense base that was trained
    in that dtype, the weights are, bit for bit, those of `PissaModel.merge_and_unload`. If it was trained in another
    dtype, W is cast to that one first. A run that was killed continues when this is called again with the same
    arguments, and produces the same bytes.

    The base function is that of the training. A stored residual of ours (`quant`) is computed again from the weight,
    and a fingerprint shows that it is the right one. The result is exact, unlike the plain LoRA. `source` may also be a
    folder that `pissa init` has written; the residual is then decoded. For a plain LoRA, and anything else that
    `pissa.convert` reads, only names and shapes show whether the checkpoint is the right one.

    Args:
        quant: a format, "nf4" or "int8": all linear layers except the output layer are written in it, as transformers
            with bitsandbytes would quantise the merged weights. "same": the codes of the base, whose scales stay, with
            the change rounded at random (`ops.merge_codes`); for a GGUF file, `pissa.export` to "gguf-model" does that.
            None: dense.
        calibration: with `quant` "same": batches of what the model will read, as `pissa.calibrate` takes them. The
            rounding errors of a layer are then carried on to where they change its outputs least (error feedback). The
            base runs once, whole in memory, to measure its layers' inputs. A layer that is not linear is rounded at
            random alone.
        progressbar: show one bar over the bytes of the checkpoint on stderr.

    Raises:
        CompletedError: an earlier call with the same arguments has written everything; nothing has been changed.
        ValueError: something cannot be read or merged; the message names file and layer. `target` is not a model then.
        OSError: the disk is full or fails.
    """
    return prepare(adapter, source, target, quant=quant, calibration=calibration).merged(progressbar)


@torch.no_grad()
def prepare(
    adapter: str | os.PathLike[str],
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    quant: str | None = None,
    calibration: Iterable[Batch] | None = None,
) -> Merge:
    """Plans a merge from names and shapes, and writes nothing. Arguments and errors are those of `merge`."""
    check_choice("quant", quant, (None, *FORMATS, SAME))
    form = IMPLICIT if quant in (None, SAME) else Form.quantised(quant, FORMATS[quant].has_double_quant)
    checkpoint = Checkpoint.open(source)
    checkpoint.require(*READ)
    if quant == SAME and (contents := checkpoint.contents) not in (Contents.RELEASED, Contents.BITSANDBYTES):
        to = ' pissa.export(..., to="gguf-model") merges into a GGUF file' if contents is Contents.GGUF else ""
        raise ValueError(f'quant: got "same", and {checkpoint.name} contains {contents.value}: leave it out.{to}')
    if calibration is not None and quant != SAME:
        raise ValueError(f'calibration: got one, and quant={quant!r}; it is for quant="same": leave it out')
    weights = read_adapter(open_adapter(Path(adapter)), checkpoint)
    plan = plan_merge(checkpoint, weights.folder, form, checkpoint.coded if quant == SAME else ())
    if quant == SAME:
        return _MergeInCodes(plan, weights, form, Path(target), None if calibration is None else list(calibration))
    return Merge(plan, weights, form, Path(target))


class Merge(Rewrite):
    """One merge, of which everything is known but the weights."""

    command = "merge"

    def __init__(self, plan: Plan, adapter: TrainedWeights, form: Form, target: Path) -> None:
        super().__init__(plan, target)
        self.adapter, self.form = adapter, form

    @torch.no_grad()
    def merged(self, progressbar: bool) -> Merged:
        """Merges. The errors are those of `merge`."""
        written = self.run(progressbar)
        for doubt in self.adapter.doubts():
            warnings.warn(doubt, stacklevel=4)  # the caller of merge
        changed = add_up(self.results[unit.name] for unit in self.plan.adapted)
        in_codes = {unit.name: sums for unit in self.plan.adapted if "along" in (sums := self.results[unit.name])}
        layers = {unit.name: len(unit.layers) for unit in self.plan.adapted}
        return Merged(
            **vars(written),
            what=self.adapter.what,
            layers=sum(layers.values()),
            quantised=len(self.plan.packed) or sum(layers[name] for name in in_codes),
            error_of_change=math.sqrt(changed["error_squared"] / changed["change"]) if changed["change"] else 0.0,
            kept=Kept.of(add_up(in_codes.values())) if in_codes else None,
            kept_of_layers={name: Kept.of(sums) for name, sums in in_codes.items()},
        )

    def identity(self) -> dict[str, Any]:
        return {"form": self.form.describe(), **self.adapter.states()}

    def write(self, out: Output, unit: Unit) -> dict[str, Result]:
        if isinstance(unit, Copy):
            self.copy(out, unit.tensor)
            return {unit.name: {}}
        if isinstance(unit, Replace):
            out.write(self.file_of(unit.tensor), unit.tensor, self._trained_tensor(unit))
            return {unit.name: {}}
        layers = self.adapter.read_trained(unit)
        sums = ({"change": change, **self._write_sum(out, layer, weight)} for layer, weight, change in layers)
        return {unit.name: add_up(sums)}

    def _write_sum(self, out: Output, layer: LayerPlan, weight: Tensor) -> dict[str, float]:
        """Writes a layer. "error_squared" is ‖Q - W'‖², and "norm_squared" is ‖W'‖²."""
        dense, form = weight.to(layer.dtype), layer.form
        new: Tensor | ops.QuantizedWeight = dense
        if layer.is_packed:
            with of_layer(layer.name):
                new = ops.quantize(dense, form.name, double_quant=form.double_quant)
        written = ops.dequantize(new) if isinstance(new, ops.QuantizedWeight) else new
        norm_squared = square(weight)
        error_squared = 0.0 if written is weight else square(weight.sub_(written))
        if not math.isfinite(norm_squared + error_squared):
            raise ValueError(f"layer {layer.name}: its merged weight is not finite in {layer.dtype} [P094]")
        self.write_layer(out, layer, new)
        return {"error_squared": error_squared, "norm_squared": norm_squared}

    def _trained_tensor(self, unit: Replace) -> Tensor:
        tensor, value = self.source.read(unit.tensor), self.adapter.folder.weights.read(unit.key)
        if unit.scaling is not None:
            return (tensor.float() + unit.scaling * value.float()).to(tensor.dtype)
        if unit.rows is None:
            return value.to(tensor.dtype)
        return tensor.index_copy(0, torch.tensor(unit.rows), value.to(tensor.dtype))


class _MergeInCodes(Merge):
    """Merges into the codes of a checkpoint: all files keep their layout."""

    not_copied = (INDEX,)

    def __init__(
        self, plan: Plan, adapter: TrainedWeights, form: Form, target: Path, calibration: list[Batch] | None
    ) -> None:
        check_low_rank(adapter)
        self.coded, self.calibration = {unit.name for unit in coded_units(plan)}, calibration
        super().__init__(plan, adapter, form, target)

    def identity(self) -> dict[str, Any]:
        read = {} if self.calibration is None else {"calibration": digest_of(self.calibration)}
        return super().identity() | {"form": SAME, **read}

    @cached_property
    def moments(self) -> Mapping[str, Tensor]:
        return moments_of(self.adapter, self.calibration)

    def write(self, out: Output, unit: Unit) -> dict[str, Result]:
        if not isinstance(unit, Layers) or unit.name not in self.coded:
            return super().write(out, unit)
        results = []
        for sums, parts in merged_layers(self.adapter, unit, self.moments):
            results.append({"error_squared": sums["change"] - 2 * sums["along"] + sums["square"], **sums})
            for name, codes, member in parts:
                weight, stored = self.source.coded[name], self.source.stored
                for tensor in weight.tensors.values():
                    values = stored.read(tensor, member)
                    if tensor == weight.codes:
                        values = codes.view(values.dtype).view(values.shape)
                    out.write(self.file_of(name), tensor, values, member)
        return {unit.name: add_up(results)}

    def write_config(self, out: Output) -> None:
        """config.json is copied with the other small files."""
