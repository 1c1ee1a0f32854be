"""Checks that the adapter in a folder fits a model: layer for layer, tensor for tensor, down to the base's values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pissa.base.digest import Match, dtype_of, is_fingerprint
from pissa.base.fingerprint import match_with
from pissa.base.stored import residual_tensors
from pissa.base.weights import is_offloaded
from pissa.config import IMPLICIT
from pissa.files.checkpoint import Checkpoint
from pissa.files.messages import shown
from pissa.files.peft_layout import FactorTensors, magnitude_key
from pissa.files.pissa_layout import PISSA_RECORD, start_shapes, stored_shapes
from pissa.files.tensor_file import SAVED_FLOATS
from pissa.files.vocabulary import VocabularyTensor
from pissa.layers.layer import PissaLayer
from pissa.notices import OtherDtypeWarning, OtherRoundingWarning, PissaWarning
from pissa.ops import QuantizedWeight


def check_layers(checkpoint: Checkpoint, layers: Mapping[str, PissaLayer], adapter_name: str) -> None:
    """Checks names, ranks and scalings of the adapted layers.

    Raises:
        ValueError: naming the first layer that differs, or is merged.
    """
    for name in [*layers, *checkpoint.records]:
        if name not in layers or name not in checkpoint.records:
            where = "folder" if name in checkpoint.records else "model"
            raise ValueError(
                f"{checkpoint.folder} does not fit the model: only in the {where} is layer {shown(name)} adapted"
            )
    for name, layer in layers.items():
        record, r, scaling = checkpoint.records[name], layer.r[adapter_name], float(layer.scaling[adapter_name])
        if (r, scaling) != (record.r, record.scaling):
            raise ValueError(
                f"{checkpoint.folder} does not fit adapter {adapter_name!r}: layer {name} has rank {r} and scaling "
                f"{scaling:g} in the model, {record.r} and {record.scaling:g} in the folder"
            )
        if adapter_name in layer.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged: call unmerge_adapter before loading into it")


def check_headers(
    checkpoint: Checkpoint,
    factors: Sequence[FactorTensors],
    layers: Mapping[str, PissaLayer],
    modules: Mapping[str, Tensor],
    embeddings: Mapping[str, Tensor],
) -> None:
    """Checks name, dtype and shape of every tensor.

    Args:
        modules, embeddings: the model's tensors beside the layers, under PEFT's names. Embeddings may be missing.

    Raises:
        ValueError: naming the file and the first tensor that differs.
    """
    weights, starts, records = checkpoint.weights, checkpoint.starts, checkpoint.records
    unknown = {weights: set(weights.names), starts: set(starts.names)}
    for key, value in embeddings.items():
        if key in unknown[weights]:
            demand = "an embedding"
            if (rows := weights.shape(key)[:1]) != value.shape[:1]:
                demand += f"; if it was resized, call model.resize_token_embeddings({rows[0]}) before loading"
            weights.expect(key, value.shape, _dtypes(value), demand)
    expected = [(weights, part.layers[0], part.shapes(2 * records[part.layers[0]].r)) for part in factors]
    expected += [
        (starts, name, start_shapes(name, records[name], layer.matrix_shape, checkpoint.config))
        for name, layer in layers.items()
    ]
    if checkpoint.config.use_dora:
        expected += [(weights, name, {magnitude_key(name): layer.matrix_shape[:1]}) for name, layer in layers.items()]
    for file, name, shapes in expected:
        demand = (
            f"layer {name}, whose weight is {list(layers[name].matrix_shape)} in this model: the file is "
            "damaged, or belongs to another base"
        )
        for key, shape in shapes.items():
            file.expect(key, shape, (torch.float32,), demand)
        unknown[file] -= shapes.keys()
    for key, value in modules.items():
        weights.expect(key, value.shape, _dtypes(value), "a module that is trained beside the layers")
    for name, layer in layers.items():
        for key, (shape, dtypes) in stored_shapes(name, records[name], layer.matrix_shape, starts).items():
            starts.expect(key, shape, dtypes, f"the residual of layer {name}")
            unknown[starts].discard(key)
    unknown[weights] -= modules.keys() | embeddings.keys()
    for file, names in unknown.items():
        if names:
            raise ValueError(f"{file.path}: tensor {shown(min(names))} belongs to no part of the adapter")


def _dtypes(value: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes in which a file may hold it."""
    return SAVED_FLOATS if value.is_floating_point() else (value.dtype,)


def check_vocabulary(
    checkpoint: Checkpoint, tables: Mapping[str, VocabularyTensor], found: Mapping[str, Tensor], alone: bool
) -> None:
    """Checks that the model can have the embeddings of the folder.

    Args:
        tables, found: the model's embeddings and the folder's, under PEFT's names.
        alone: whether the model has no other adapters. They were trained with the embeddings that it has.

    Raises:
        ValueError: naming the first tensor that differs.
    """
    for key, table in tables.items():
        if alone and not is_offloaded(table.module):
            twins = (other for other in tables if tables[other].parameter is table.parameter)
            if all(torch.equal(found[other], found[key]) for other in twins):
                continue
            reason = "another tensor of the file, which in this model shares its weight: untie them first"
        elif torch.equal(found[key].to(table.parameter.dtype), table.value({})):
            continue
        elif alone:
            reason = "the model's embedding, which is offloaded: give it a device of its own in device_map"
        else:
            reason = (
                "the model's embedding, which the model's other adapters were trained with. Load the folder onto a "
                "base of its own with from_pretrained"
            )
        raise ValueError(f"{checkpoint.weights.path}: tensor {key!r} differs from {reason}")


def check_base(
    checkpoint: Checkpoint,
    name: str,
    layer: PissaLayer,
    weight: tuple[str, Tensor] | None,
    residual: Tensor | QuantizedWeight | None,
) -> Match:
    """Checks that a layer's base is the one that the adapter was trained on. Returns SAME, or ROUNDED if the model's
    dtype does not hold its values.

    Args:
        weight: the name and the value of the tensor in the folder that the base's weight will be replaced by.
        residual: the residual in the folder that the base will be replaced by.

    Raises:
        ValueError: it is another one.
    """
    record = checkpoint.records[name]
    if residual is not None:
        if not is_fingerprint(record.stored, *residual_tensors(residual).values()):
            raise ValueError(
                f"{checkpoint.folder / PISSA_RECORD} and {checkpoint.starts.path} do not belong together, or one is "
                f"damaged: the residual of layer {name} is not the one that was saved"
            )
        return Match.SAME
    if weight is not None:
        key, value = weight
        found = match_with(record.weight, layer.base, value)
        if found is Match.OTHER:
            raise ValueError(
                f"{checkpoint.weights.path}: tensor {key!r} is not the weight that layer {name} was trained on: take "
                "the file from a copy"
            )
        return found
    found = layer.fingerprints.match_weight(layer.base, record.weight)
    if found is Match.OTHER:
        raise ValueError(
            f"the model is not the base that {checkpoint.folder} was trained on; the first layer that differs is "
            f"{name}: its weight has other values, in {dtype_of(record.weight)}, in which it was trained on. Load the "
            "same checkpoint; to apply the adapter to another base all the same, use peft.PeftModel.from_pretrained, "
            "for which the folder is a plain LoRA"
        )
    return found


def other_dtype(folder: Path, narrower: Mapping[str, torch.dtype], was: torch.dtype) -> OtherDtypeWarning:
    """The warning of a base whose values were in the dtype `was`.

    Args:
        narrower: the layers whose base is in a dtype that does not hold them, with that dtype.
    """
    name, dtype = next(iter(narrower.items()))
    return OtherDtypeWarning(
        f"{folder} was written for a base in {was}, which is in {dtype} here: {len(narrower)} layers, {name} the "
        f"first, differ by roundings, as far as a sample of their values shows. For the exact function, load the base "
        f"in {was}."
    )


def base_doubts(
    checkpoint: Checkpoint, narrower: Mapping[str, torch.dtype], other_bits: Iterable[str]
) -> list[PissaWarning]:
    """The warnings of a base that is not, bit for bit, the one of the training.

    Args:
        narrower: see `other_dtype`.
        other_bits: the layers whose residual was made again, and has other bits.
    """
    found: list[PissaWarning] = []
    if narrower:
        found.append(
            other_dtype(checkpoint.folder, narrower, dtype_of(checkpoint.records[next(iter(narrower))].weight))
        )
    if rounded := [name for name in other_bits if name not in narrower]:
        found.append(
            OtherRoundingWarning(
                f"The residual of {len(rounded)} layers, {rounded[0]} the first, differs in some bits from the one "
                f"that {checkpoint.folder} was trained with: this machine rounds differently. The function is the same "
                "up to the rounding of a few weights."
            )
        )
    return found


def check_form(checkpoint: Checkpoint, name: str, layer: PissaLayer) -> None:
    """Checks that a layer's base is stored as the one that the adapter was trained on.

    Raises:
        ValueError: it has another form, or another residual.
    """
    record, base = checkpoint.records[name], layer.base
    if base.form != record.form or (base.form != IMPLICIT and not layer.fingerprints.residual_is(base, record.stored)):
        raise ValueError(
            f"{checkpoint.folder} was trained on another base function: the residual of layer {name} was "
            f"{record.form.describe()} and is {base.form.describe()} in this model, or has other "
            "values. Load the folder onto an unmodified base of its own with from_pretrained"
        )
