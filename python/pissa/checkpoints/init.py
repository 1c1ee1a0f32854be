"""Splits a checkpoint on disk, a few matrices at a time. The residuals become a checkpoint with the same files, and the
start factors a plain LoRA next to them. The configuration alone determines which tensors are layers of an adapter, on
the meta device."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pissa import distributed, ops
from pissa.adapters.lora_folder import INITIAL_WEIGHTS
from pissa.adapters.peft_layout import (
    Matrices,
    adapted_names,
    check_uniform,
    factors_of,
    plain_config,
    plain_config_text,
)
from pissa.adapters.pissa_layout import PISSA_WEIGHTS, RECIPE, AdapterRecord, LayerRecord
from pissa.base.digest import fingerprint
from pissa.base.init_methods import INIT_METHODS, StartTask, lacks_start, start_with_codes
from pissa.base.start import StartFactors
from pissa.base.stored import residual_tensors as tensors_of
from pissa.base.stored import residuals_of
from pissa.checkpoints.load import mapped_model
from pissa.checkpoints.output import Output
from pissa.checkpoints.rewrite import (
    Copy,
    LayerPlan,
    Layers,
    Plan,
    Result,
    Rewrite,
    Unit,
    Written,
    add_up,
    matrix_shape,
    square,
)
from pissa.config import Form, PissaConfig
from pissa.containers.checkpoint import AS_STORED, INITIAL_FOLDER, PISSA_RECORD, Checkpoint, Contents
from pissa.containers.hub import Name
from pissa.containers.model_folder import Part
from pissa.containers.recognise import ADAPTER_CONFIG
from pissa.containers.staged import write_text
from pissa.containers.tensor_file import Layout
from pissa.layers.experts import UnfusedExperts, unfused_experts
from pissa.layers.factory import leave_out
from pissa.layers.layer import PissaLayer, pissa_layers
from pissa.layers.modules import PissaLinear
from pissa.model.batches import Batch, digest_of
from pissa.model.calibrate import BlockMoments, check_wanted
from pissa.model.inject import own_config
from pissa.model.pissa_model import model_class
from pissa.ops.low_rank import pad_rank

DENSE = "dense"


class SplitPlan(Plan):
    """How a checkpoint changes when its layers get an adapter.

    Args:
        config: without `quant` and `residual`, it means residual="explicit".
        experts: how the residual of fused experts is kept if the other layers' residual is quantised: "dense", as in
            the checkpoint; or the name of that format, in which each expert is stored separately.
    """

    def __init__(self, source: Checkpoint, config: PissaConfig, experts: str = DENSE) -> None:
        self.experts, self.config = experts, _complete(config, experts, source)
        """The given configuration, with the names of the layers that it means, and with a stored form."""
        config, base = self.config, _with_adapter(self.config, source)
        adapted, stacks = pissa_layers(base), unfused_experts(base)
        check_uniform(base, {name: (layer.r["default"], layer.scaling["default"]) for name, layer in adapted.items()})
        self._of_experts = _dense(config) if stacks and experts == DENSE else config
        layers = self._plan_layers(source, base, adapted, stacks)
        self.origins = {name: adapted[name].origin("default", self.config_of(layer)) for name, layer in layers.items()}
        """The origins of the layers' start factors, by name."""
        self.factors = factors_of(base, adapted)
        """The layout of the start factors in the plain LoRA."""
        self.lora, self.model_type = plain_config(base, config, "default", adapted, times=1), type(base)
        units = [Layers(pair.keys[0], tuple(layers[name] for name in pair.layers), pair) for pair in self.factors]
        initial = (pair.shapes(self.origins[pair.layers[0]].r) for pair in self.factors)
        others = {INITIAL_WEIGHTS: _float32(initial)}
        if config.quant_iters > 1:
            others[PISSA_WEIGHTS] = _float32(self._recipe_shapes(layer) for layer in layers.values() if layer.is_packed)
        super().__init__(source, units, others)
        if config.needs_calibration:  # calibration finds blocks in order, but in files 10 comes before 9
            self.units.sort(key=lambda unit: [int(part) if part.isdigit() else -1 for part in unit.name.split(".")])

    def _plan_layers(
        self,
        source: Checkpoint,
        base: PreTrainedModel,
        adapted: Mapping[str, PissaLayer],
        stacks: Mapping[str, UnfusedExperts],
    ) -> dict[str, LayerPlan]:
        """How each adapted layer of the model without values is rewritten."""
        uses = Counter(id(value) for _, value in base.named_parameters(remove_duplicate=False))
        is_expert = {name: name.rpartition(".")[0].rpartition(".")[0] in stacks for name in adapted}
        forms = {name: (self._of_experts if is_expert[name] else self.config).form for name in adapted}
        for name, layer in adapted.items():
            _check_layer(name, layer, forms[name], uses)
        parts = _parts(adapted, stacks, source)
        layers = dict[str, LayerPlan]()
        for name, layer in adapted.items():
            shape, dtype = matrix_shape(name, parts[name], source)
            if shape != layer.matrix_shape:
                raise ValueError(
                    f"{source.path_of(parts[name][0].tensor)}: layer {name} is {list(shape)}, needed is "
                    f"{list(layer.matrix_shape)}: config.json belongs to another checkpoint [P086]"
                )
            layers[name] = LayerPlan(name, parts[name], shape, dtype, forms[name], is_expert[name])
        return layers

    def config_of(self, layer: LayerPlan) -> PissaConfig:
        """The configuration that splits a layer: the plan's or, for fused experts, one with a dense residual."""
        return self._of_experts if layer.is_expert else self.config

    def recipe_tensors(self, layer: LayerPlan, start: StartFactors) -> dict[str, Tensor]:
        """The factors that a layer's residual lacks, if alternations may have found others than the start's. They are
        padded with zeros to the rank of the start."""
        if self.config_of(layer).quant_iters == 1:
            return {}
        return dict(zip(self._recipe_shapes(layer), pad_rank(*start.removed, start.origin.r), strict=True))

    def _recipe_shapes(self, layer: LayerPlan) -> dict[str, tuple[int, ...]]:
        (rows, columns), r = layer.shape, self.origins[layer.name].r
        return {f"{layer.name}.{RECIPE[0]}": (r, columns), f"{layer.name}.{RECIPE[1]}": (rows, r)}


def _float32(shapes: Iterable[Mapping[str, tuple[int, ...]]]) -> Layout:
    return Layout({name: (torch.float32, shape) for of_layer in shapes for name, shape in of_layer.items()})


def _complete(given: PissaConfig, experts: str, source: Checkpoint) -> PissaConfig:
    """The configuration of a split: a stored form, and the kind of the model. The given one stays as it is."""
    config = own_config(given)
    if config.quant is None and config.residual is None:
        config.residual = "explicit"
    _check_config(config, experts)
    source.require(Contents.DENSE, *AS_STORED)
    if config.task_type is None and type(source.model).__name__.endswith("ForCausalLM"):
        config.task_type = "CAUSAL_LM"
    return config


def _with_adapter(config: PissaConfig, source: Checkpoint) -> PreTrainedModel:
    """The model of a checkpoint, without values, with an adapter in its layers."""
    base: PreTrainedModel = model_class(config)(source.meta_model(), config, "default").base_model.model
    if config.modules_to_save:
        raise ValueError(
            f"modules_to_save={config.modules_to_save}, given or by task_type={config.task_type!r}, is trained "
            "whole and starts with the training: leave it out here, and give it to the trainer [P087]"
        )
    return base


def _check_config(config: PissaConfig, experts: str) -> None:
    if experts not in (DENSE, config.quant):
        raise ValueError(
            f"experts: got {experts!r}; allowed: {DENSE!r}, or that of the other layers, quant={config.quant!r} [P089]"
        )
    for name in ("modules_to_save", "trainable_token_indices", "use_dora", "repair"):
        if value := getattr(config, name):
            raise ValueError(
                f"{name}={value!r} is not for a checkpoint, whose adapter is a plain LoRA on the residual: leave it "
                "out, and give it to the trainer (repair: to pissa.load, with the folder) [P087]"
            )
    if INIT_METHODS[config.init].is_given:
        raise ValueError(f"init={config.init!r} takes factors from elsewhere and cannot start from a checkpoint [P087]")


def _dense(config: PissaConfig) -> PissaConfig:
    """The configuration of layers whose residual stays dense, whatever the other layers' is."""
    if config.init == "activations":
        raise ValueError(
            f"init={config.init!r} starts from the error of the format, but a dense residual, such as that of "
            f"fused experts, has none: give experts={config.quant!r} or another init, or leave the experts out with "
            "exclude_modules [P089]"
        )
    changed: dict[str, Any] = {"quant": None, "quant_iters": 1, "error_feedback": False, "residual": "explicit"}
    return config if config.quant is None else dataclasses.replace(config, **changed)


def _check_layer(name: str, layer: PissaLayer, form: Form, uses: Counter[int]) -> None:
    """Raises ValueError if a checkpoint cannot keep the layer's residual in this form."""
    why = None
    if not isinstance(layer, PissaLinear):
        why = f"layer {name} is a {type(layer.base.module).__name__}, whose weight stays as it is in every form"
    elif form.name != "explicit" and layer.base.module_class is Conv1D:
        why = (
            f"layer {name} is a Conv1D, which transformers cannot load in {form.name} as it would have to be kept: "
            "leave quant out"
        )
    elif uses[id(layer.base.parameter)] > 1:
        why = f"the weight of layer {name} is tied to another module's, which would get the residual too"
    if why is not None:
        raise ValueError(f"{why}; {leave_out(name)} [P088]")


def _parts(
    layers: Mapping[str, PissaLayer], stacks: Mapping[str, UnfusedExperts], source: Checkpoint
) -> dict[str, tuple[Part, ...]]:
    """The parts of every layer."""
    parts: dict[str, tuple[Part, ...]] = {}
    try:
        for path, experts in stacks.items():
            for leaf in adapted_names(path, experts, layers):
                name = f"{path}.0.{leaf}"
                parts |= source.layers_of(f"{path}.{leaf}")
        for name in [name for name in layers if name not in parts]:
            parts |= source.layers_of(f"{name}.weight", layers[name].base.module_class is Conv1D)
    except ValueError as error:
        raise ValueError(f"layer {name}: {error}; {leave_out(name)}") from None
    return parts


MEMORY = 10**9
"""The default number of bytes in flight."""

# Elements of the matrices that are split at once, for each thread, as in `model.decompose`.
_GROUP = 1 << 22

_PASSES = 14
"""The most passes that `ops.split_many` makes over a weight."""

_SAMPLE = 64
"""The fraction of the rows, from the first on, that is compared with the residual and the factors, but at least 16
rows. It takes 1 to 3% of the time."""


@dataclass(frozen=True)
class Initialised(Written):
    """The result of `init`. Its `error` is ‖W - Q - s B0 A0‖ / ‖W‖, from the first 64th of each layer's rows."""

    layers: int
    only_ours: bool
    """Whether only `pissa.load` reads the result, because fused experts are quantised."""


def init(
    source: Name,
    target: str | os.PathLike[str],
    config: PissaConfig,
    *,
    memory: int = MEMORY,
    device: str | torch.device = "cpu",
    experts: str = DENSE,
    calibration: Iterable[Batch] | None = None,
    progressbar: bool = False,
) -> Initialised:
    """Writes the residuals of a checkpoint as a checkpoint, and the start factors as a LoRA in its folder pissa_init.
    The paper's authors publish theirs in this layout, so that any program that trains a LoRA on a model trains PiSSA.

    Each matrix is read from the mapped file, split, and written. A run that was killed continues when this is called
    again with the same arguments, and produces the same bytes. With several processes (torch.distributed), all of them
    must call this function. They share the work, and write into the same files.

    Args:
        source: a checkpoint in safetensors with config.json or in GGUF: its folder or file, or its name on the Hub.
        target: a new folder, or the folder of an unfinished run.
        config: `quant` says how the residual is kept; None keeps it dense.
        memory: limit in bytes for matrices and what is computed from them at one time. A matrix that needs more gets
            it. The start factors of a stack of experts are not counted. They wait for those of its last expert:
            float32, r times its rows and columns for each.
        device: the device that splits matrices.
        experts: see `SplitPlan`.
        calibration: with `quant`, and init="activations" or error_feedback=True: batches of what the model will read,
            as `pissa.calibrate` takes them. The model then runs over its mapped files, on the CPU, block by block. The
            second moments of one block are in memory, together with the batches at that block. Every process does this.
        progressbar: one bar over the bytes of the checkpoint, on stderr.

    Raises:
        CompletedError: an earlier call with the same arguments has written everything; nothing has been changed.
        ValueError, TypeError: a checkpoint cannot be read, planned or split (the message names file and tensor), or the
            folder contains something else. If a matrix cannot be split, what was written is removed, unless several
            processes write.
        OSError: the disk is full or fails. What was written stays, and the same call goes on.
        pissa.distributed.RankError: another process has failed.
    """
    with distributed.failing_together():
        checkpoint = Checkpoint.open(source)
        plan = SplitPlan(checkpoint, config, experts)
        check_wanted(config, calibration)
        calibration = None if calibration is None else list(calibration)
        plan.config.base_model_name_or_path = checkpoint.name
        run = _Split(plan, Path(os.path.abspath(target)), memory, torch.device(device), calibration)
        written = run.run(progressbar)
        return Initialised(
            **vars(written),
            layers=len(plan.layers),
            only_ours=plan.has_packed_experts,
        )


class _Group(NamedTuple):
    """Layers that are split together."""

    layers: list[LayerPlan]
    finished: list[Unit]
    """The units whose last layers are in this group."""

    @property
    def tensors(self) -> list[str]:
        """The tensors of the checkpoint that are read."""
        copied = [unit.tensor for unit in self.finished if isinstance(unit, Copy)]
        return [*(name for layer in self.layers for name in layer.tensors), *copied]


class _SplitLayer(NamedTuple):
    """What waits of a layer that has been split until all layers of its unit have been."""

    factors: Matrices
    """The start factors, on the CPU."""
    result: Result
    record: dict[str, Any]
    """Its entry in pissa.json."""


class _Split(Rewrite):
    """One run of `init`."""

    command = "init"
    plan: SplitPlan

    def __init__(
        self, plan: SplitPlan, target: Path, memory: int, device: torch.device, calibration: Sequence[Batch] | None
    ) -> None:
        super().__init__(plan, target)
        self.memory, self.device, self.calibration = memory, device, calibration
        self._moments: BlockMoments | None = None
        self._waiting: dict[str, _SplitLayer] = {}

    @property
    def lacks_start(self) -> bool:
        return lacks_start(self.plan.config)

    def identity(self) -> dict[str, Any]:
        others = {"experts": self.plan.experts, "device": self.device.type, "target": str(self.target)}
        if self.calibration is not None:
            others["calibration"] = digest_of(self.calibration)
        values = {field.name: getattr(self.plan.config, field.name) for field in dataclasses.fields(PissaConfig)}
        del values["base_model_name_or_path"], values["runtime_config"]
        return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()} | others

    def groups(self, units: Sequence[Unit]) -> Iterator[_Group]:
        """The layers of the units, in order, in groups that stay within the memory, or of a single layer."""
        limit = _GROUP * torch.get_num_threads()
        group, size, elements = _Group([], []), 0, 0
        for unit in units:
            for layer in unit.layers if isinstance(unit, Layers) else ():
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
        self._split(out, group.layers)
        results: dict[str, Result] = {}
        for unit in group.finished:
            if isinstance(unit, Layers):
                results[unit.name] = self._write_factors(out, unit)
            else:
                self.copy(out, unit.tensor)
                results[unit.name] = {}
        return results

    def _write_factors(self, out: Output, unit: Layers) -> Result:
        """Writes the start factors of a unit's layers, all of which have been split."""
        assert unit.factors is not None  # as `SplitPlan` makes them
        layers = {layer.name: self._waiting.pop(layer.name) for layer in unit.layers}
        for key, tensor in unit.factors.pack([layer.factors for layer in layers.values()]).items():
            out.write(INITIAL_WEIGHTS, key, tensor)
        sums = add_up(layer.result for layer in layers.values())
        return sums | {"records": {name: layer.record for name, layer in layers.items()}}

    def _split(self, out: Output, layers: Sequence[LayerPlan]) -> None:
        """Splits these layers, and writes their residuals."""
        weights = {layer.name: self.source.matrix(layer.parts).to(self.device) for layer in layers}
        for form in dict.fromkeys(layer.form for layer in layers):
            these = [layer for layer in layers if layer.form == form]
            config, names = self.plan.config_of(these[0]), [layer.name for layer in these]
            matrices, origins = [weights[name] for name in names], [self.plan.origins[name] for name in names]
            moments = self._moments_of(names) if config.needs_calibration else None
            try:
                starts, codes = start_with_codes(StartTask(matrices, origins, config, names, moments))
            except ValueError as error:
                paths = dict.fromkeys(str(self.source.path_of(name)) for layer in these for name in layer.tensors)
                raise ValueError(f"{', '.join(paths)}: {error}") from error
            residuals = residuals_of(matrices, starts, form, names) if codes is None else codes
            for layer, weight, start, residual in zip(these, matrices, starts, residuals, strict=True):
                self._waiting[layer.name] = self._write_residual(out, layer, weight, start, residual)

    def _write_residual(
        self, out: Output, layer: LayerPlan, weight: Tensor, start: StartFactors, residual: Tensor | ops.QuantizedWeight
    ) -> _SplitLayer:
        self.write_layer(out, layer, residual)
        for name, values in self.plan.recipe_tensors(layer, start).items():
            out.write(PISSA_WEIGHTS, name, values)
        record = LayerRecord(
            start.origin.r,
            start.origin.scaling,
            fingerprint(weight),
            layer.form,
            stored=fingerprint(*tensors_of(residual).values()),
            start=fingerprint(*start.known_by),
            recipe=start.recipe_rank or None,
        )
        sums = _sampled_error(weight, residual, start)
        return _SplitLayer((start.a0.cpu(), start.b0.cpu()), sums, record.as_json())

    def _moments_of(self, names: Sequence[str]) -> list[Tensor] | None:
        """The second moments of what these layers read. The model begins to run at the first of them."""
        if self._moments is None:
            assert self.calibration is not None  # as `check_wanted` has seen
            units = [unit for unit in self.units_to_write if isinstance(unit, Layers)]
            layers = [layer for unit in units for layer in unit.layers]
            wanted = [layer.name for layer in layers if self.plan.config_of(layer).needs_calibration]
            config, model = own_config(self.plan.config), mapped_model(self.source, None)
            self._moments = BlockMoments(model_class(config)(model, config, "default"), self.calibration, wanted)
        return self._moments.of(names, self.device)

    def end(self, out: Output) -> None:
        lora, records = self.plan.lora, dict[str, LayerRecord]()
        lora.base_model_name_or_path = str(self.target)
        for result in self.results.values():
            records |= {name: LayerRecord.from_json(record) for name, record in result.get("records", {}).items()}
        write_text(out.path(f"{INITIAL_FOLDER}/{ADAPTER_CONFIG}"), plain_config_text(lora, self.plan.model_type))
        write_text(out.path(PISSA_RECORD), AdapterRecord(self.plan.config, records).text())

    def in_flight(self, layer: LayerPlan) -> int:
        """Bytes that a layer needs while it is split, in addition to the mapped file."""
        config, r = self.plan.config_of(layer), self.plan.origins[layer.name].r
        elements, sides = math.prod(layer.shape), sum(layer.shape)
        method = INIT_METHODS[config.init]
        size = 4 * sides * (r + (r + 16) * (_PASSES // 2 + 1))  # the factors, and roughly the bases that the SVD keeps
        is_view = len(layer.parts) == 1 and not layer.parts[0].transposed
        size += 0 if is_view else elements * layer.dtype.itemsize
        if config.needs_calibration:
            size += 16 * layer.shape[1] ** 2 + 8 * elements  # the moment, its factor, and what remains to be rounded
        size += sum(math.prod(shape) * dtype.itemsize for dtype, shape in layer.written.values())
        if method.repairs or config.quant_iters > 1:
            size += 8 * elements
        return size


# ---- The error -------------------------------------------------------------------------------------------------------


def _sampled_error(weight: Tensor, residual: Tensor | ops.QuantizedWeight, start: StartFactors) -> Result:
    """‖W - Q - s B0 A0‖² and ‖W‖² of the first rows."""
    rows = min(len(weight), max(16, len(weight) // _SAMPLE))
    sample = weight[:rows].float()
    first = torch.arange(rows, device=weight.device)
    stored = residual[:rows].float() if isinstance(residual, Tensor) else ops.embedding(first, residual)
    error = torch.addmm(sample - stored, start.b0[:rows], start.a0, alpha=-start.origin.scaling)
    return {"error_squared": square(error), "norm_squared": square(sample)}
