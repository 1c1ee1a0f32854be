"""Putting a saved adapter into a model, bit for bit. All of it is checked before anything is changed."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from pissa.base.digest import Match, dtype_of, holds, is_fingerprint, match
from pissa.base.stored import residual_tensors, residuals_of
from pissa.base.weights import is_offloaded
from pissa.config import IMPLICIT, PissaConfig
from pissa.distributed import is_dtensor, is_of_an_engine, is_partitioned, sharded_as
from pissa.files.lora_folder import LoraFolder, check_same_layers, open_adapter, rank_and_scaling
from pissa.files.messages import shown
from pissa.files.peft_layout import PREFIX, FactorTensors, factors_of, is_of_a_layer, magnitude_key
from pissa.files.pissa_layout import PISSA_RECORD, LayerTensors, PissaFolder
from pissa.files.tensor_file import SAVED_FLOATS
from pissa.files.vocabulary import VocabularyTensor, vocabulary
from pissa.layers.factory import check_values
from pissa.layers.layer import PissaLayer, pissa_layers
from pissa.notices import OtherDtypeWarning, OtherRoundingWarning, PissaWarning
from pissa.ops import QuantizedWeight


def restore(folder: PissaFolder, model: PeftModel, adapter_name: str) -> None:
    """Puts parameters and start factors into an adapter that the PissaModel has. Nothing is decomposed.

    Raises:
        ValueError: the base or the adapter is not the one that was saved, naming the first layer that differs, or a
            damaged file, naming file and tensor. Nothing has been changed then.
    """
    alone = len(model.peft_config) == 1
    tables = vocabulary(model, adapter_name)
    _check_not_partitioned(folder, model, tables)
    check_values(model.base_model.model, adapter_name)
    layers = pissa_layers(model.base_model.model, adapter_name)
    _check_layers(folder, layers, adapter_name)
    factors = factors_of(model.base_model.model, layers)
    modules = _modules_beside(model, adapter_name)
    _check_headers(folder, factors, layers, modules, tables)

    others = {key: folder.weights.read(key) for key in folder.weights.entries if key in modules or key in tables}
    tables = {key: table for key, table in tables.items() if key in others}
    residuals = _residuals(folder, layers)
    # A weight that is kept as a residual, or will be, is compared by that.
    dense = {
        key: table
        for key, table in tables.items()
        if not table.is_stored and not any(table.is_of(layers[name]) for name in residuals)
    }
    _check_vocabulary(folder, dense, others, alone)
    new = dense if alone else {}
    narrower: dict[str, tuple[torch.dtype, torch.dtype]] = {}
    for name, layer in layers.items():
        weight = next(((key, others[key]) for key, table in new.items() if table.is_of(layer)), None)
        if _match_base(folder, name, layer, weight, residuals.get(name)) is Match.ROUNDED:
            narrower[name] = layer.dense_dtype, dtype_of(folder.records[name].weight)
        is_fresh = alone and adapter_name not in layer.lora_start
        _check_form(folder, name, layer, is_fresh)
    tensors = _layer_tensors(folder, factors)

    for key, table in new.items():
        if not is_offloaded(table.module):
            table.put(others[key])
    other_bits = []
    for name, layer in layers.items():
        if not _restore_layer(
            folder, name, layer, tensors[name], residuals.get(name), name not in narrower, adapter_name
        ):
            other_bits.append(name)
            recorded = dtype_of(folder.records[name].weight)
            if isinstance(layer.base.residual, Tensor) and not holds(layer.dense_dtype, recorded):
                narrower[name] = layer.dense_dtype, recorded
    for field in ("init", "start_norm"):  # an adapter that was there may have started elsewhere
        setattr(model.peft_config[adapter_name], field, getattr(folder.config, field))
    if modules:
        trained = {key: sharded_as(parameter, others[key]) for key, parameter in modules.items()}
        set_peft_model_state_dict(model, trained, adapter_name)
    for doubt in base_doubts(folder.path, narrower, other_bits):
        warnings.warn(doubt, stacklevel=3)  # the caller of from_pretrained or load_adapter


def _modules_beside(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """The model's tensors that are trained beside those of the layers, `modules_to_save` and tokens, under PEFT's
    names."""
    adapted = pissa_layers(model.base_model.model)
    layers = pissa_layers(model.base_model.model, adapter_name)
    trained = {f"{PREFIX}{name}.{key}" for name, layer in layers.items() for key in layer.state_keys(adapter_name)}
    state = {key: value for key, value in model.state_dict().items() if key not in trained}
    found = get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter_name, save_embedding_layers=False)
    return {key: value for key, value in found.items() if not is_of_a_layer(key, adapted)}


def _residuals(folder: PissaFolder, layers: Mapping[str, PissaLayer]) -> dict[str, Tensor | QuantizedWeight]:
    """The residuals in the folder that dense bases are to be replaced by."""
    found = {}
    for name, layer in layers.items():
        if folder.records[name].form != layer.base.form:
            residual = folder.read_stored(name, layer.matrix_shape, layer.base.device)
            if residual is not None:
                found[name] = residual
    return found


def _layer_tensors(folder: PissaFolder, factors: Iterable[FactorTensors]) -> dict[str, LayerTensors]:
    found = {}
    for part in factors:
        a, b = (folder.weights.read(key) for key in part.keys)
        for name, pair in part.unpack(a, b).items():
            found[name] = folder.read_layer(name, *pair)
    return found


@torch.no_grad()
def _restore_layer(
    folder: PissaFolder,
    name: str,
    layer: PissaLayer,
    tensors: LayerTensors,
    residual: Tensor | QuantizedWeight | None,
    is_same: bool,
    adapter_name: str,
) -> bool:
    """Puts the tensors into a layer, whose weight is the same as in the training or has other roundings. Returns
    whether its residual is then, bit for bit, the one of the training."""
    record = folder.records[name]
    device = layer.device_of(adapter_name)
    exact = True
    if record.form != layer.base.form:
        base = tensors.base.to(device)
        if residual is None:
            weight = layer.base.matrix()
            weight = weight.to(dtype_of(record.weight)) if is_same else weight
            [residual] = residuals_of([weight], [base], record.form, [name])
        if isinstance(residual, Tensor):
            residual = residual.to(layer.dense_dtype)
        if is_same:
            layer.fingerprints.learn_weight(layer.base, record.weight)
        layer.store_base(residual, base, folder.config)
        exact = layer.fingerprints.residual_is(layer.base, record.stored)
    layer.share_start(adapter_name, tensors.start.to(device))
    for delta, saved in zip(layer.deltas(adapter_name), tensors.deltas, strict=True):
        if delta is not None and saved is not None:
            delta.copy_(sharded_as(delta, saved))
    if tensors.magnitude is not None:
        layer.magnitude(adapter_name).set(*tensors.magnitude)
    return exact


# -- whether it fits


def _check_not_partitioned(folder: PissaFolder, model: PeftModel, tables: Mapping[str, VocabularyTensor]) -> None:
    adapters = (parameter for name, parameter in model.named_parameters() if ".lora_" in name)
    if any(map(is_partitioned, adapters)) or any(map(is_of_an_engine, model.modules())):
        raise ValueError(
            "the model is partitioned by DeepSpeed ZeRO-3, its adapters too: load the adapter before "
            "deepspeed.initialize, or resume with the engine's load_checkpoint"
        )
    for key, table in tables.items():
        if key in folder.weights.entries and is_partitioned(table.parameter):
            raise ValueError(
                f"{folder.path} has the base's {key}, which DeepSpeed ZeRO-3 has partitioned here. Load the model "
                "without zero.Init, the folder onto it, and let deepspeed.initialize partition it then"
            )


def _check_layers(folder: PissaFolder, layers: Mapping[str, PissaLayer], adapter_name: str) -> None:
    check_same_layers(
        f"{folder.path} does not fit adapter {adapter_name!r}",
        "in the model",
        {name: rank_and_scaling(layer.r[adapter_name], layer.scaling[adapter_name]) for name, layer in layers.items()},
        "in the folder",
        {name: rank_and_scaling(record.r, record.scaling) for name, record in folder.records.items()},
    )
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"adapter {adapter_name!r} is merged: call unmerge_adapter before loading into it")


def _check_headers(
    folder: PissaFolder,
    factors: Sequence[FactorTensors],
    layers: Mapping[str, PissaLayer],
    modules: Mapping[str, Tensor],
    tables: Mapping[str, VocabularyTensor],
) -> None:
    """Checks that the two files hold the tensors of these layers and modules, and perhaps embeddings, by name, dtype
    and shape, with checksums, and no others."""
    weights, starts = folder.weights, folder.starts
    known = {weights: modules.keys() | tables.keys(), starts: set[str]()}
    for key, table in tables.items():
        if key in weights.entries:
            demand = "an embedding"
            if (rows := weights.entries[key].shape[:1]) != table.parameter.shape[:1]:
                demand += f"; if it was resized, call model.resize_token_embeddings({rows[0]}) before loading"
            weights.expect(key, table.parameter.shape, SAVED_FLOATS, demand)
    expected = [(weights, part.layers[0], part.shapes(2 * folder.records[part.layers[0]].r)) for part in factors]
    for name, layer in layers.items():
        expected.append((starts, name, folder.start_shapes(name, layer.matrix_shape)))
        if folder.config.use_dora:
            expected.append((weights, name, {magnitude_key(name): layer.matrix_shape[:1]}))
    for file, name, shapes in expected:
        demand = (
            f"layer {name}, whose weight is {list(layers[name].matrix_shape)} in this model: the file is "
            "damaged, or belongs to another base"
        )
        for key, shape in shapes.items():
            file.expect(key, shape, (torch.float32,), demand)
        known[file] |= shapes.keys()
    for key, value in modules.items():
        allowed = SAVED_FLOATS if value.is_floating_point() else [value.dtype]
        weights.expect(key, value.shape, allowed, "a module that is trained beside the layers")
    for name, layer in layers.items():
        for key, (shape, dtypes) in folder.stored_shapes(name, layer.matrix_shape).items():
            starts.expect(key, shape, dtypes, f"the residual of layer {name}")
            known[starts].add(key)
    for file, keys in known.items():
        if unknown := file.entries.keys() - keys:
            raise ValueError(f"{file.path}: tensor {shown(min(unknown))} belongs to no part of the adapter")
        file.expect_checksums()


def _check_vocabulary(
    folder: PissaFolder, tables: Mapping[str, VocabularyTensor], found: Mapping[str, Tensor], alone: bool
) -> None:
    """Checks that the model can have the embeddings `found` in the folder in the place of `tables`, its own. Other
    adapters, if the one is not alone, were trained with those that it has."""
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
        raise ValueError(f"{folder.weights.path}: tensor {key!r} differs from {reason}")


def _match_base(
    folder: PissaFolder,
    name: str,
    layer: PissaLayer,
    weight: tuple[str, Tensor] | None,
    residual: Tensor | QuantizedWeight | None,
) -> Match:
    """Compares a layer's base with the one that the adapter was trained on; or what is in the folder and will replace
    that: its weight, whose name in the file is given, or a residual.

    Returns:
        SAME, or ROUNDED if the model's dtype does not hold its values. Another one is refused.
    """
    record = folder.records[name]
    if residual is not None:
        if not is_fingerprint(record.stored, *residual_tensors(residual).values()):
            raise ValueError(
                f"{folder.path / PISSA_RECORD} and {folder.starts.path} do not belong together, or one is "
                f"damaged: the residual of layer {name} is not the one that was saved"
            )
        return Match.SAME
    if weight is not None:
        key, value = weight
        found = match(record.weight, layer.base.holding(value.to(layer.base.parameter.dtype)).matrix())
        if found is Match.OTHER:
            raise ValueError(
                f"{folder.weights.path}: tensor {key!r} is not the weight that layer {name} was trained on: take the "
                "file from a copy"
            )
        return found
    found = layer.fingerprints.match_weight(layer.base, record.weight)
    if found is Match.OTHER:
        raise ValueError(
            f"the model is not the base that {folder.path} was trained on; the first layer that differs is {name}: its "
            f"weight has other values, in {dtype_of(record.weight)}, in which it was trained on. Load the same "
            "checkpoint; to apply the adapter to another base all the same, use peft.PeftModel.from_pretrained, for "
            "which the folder is a plain LoRA"
        )
    return found


def _check_form(folder: PissaFolder, name: str, layer: PissaLayer, is_fresh: bool) -> None:
    """Checks that a layer's base is stored as the one that the adapter was trained on, or can become so: if it is
    dense, and no adapter of the model has been put on it yet."""
    record, base = folder.records[name], layer.base
    if record.form != base.form and is_dtensor(base.parameter):
        raise ValueError(
            f"{folder.path} keeps the base of layer {name} as {record.form.describe()}, and in the model its weight "
            "is sharded by fully_shard, which keeps it: load the folder first, and shard the model then"
        )
    if is_fresh and base.form == IMPLICIT:
        return
    if base.form != record.form or (base.form != IMPLICIT and not layer.fingerprints.residual_is(base, record.stored)):
        raise ValueError(
            f"{folder.path} was trained on another base function: the residual of layer {name} was "
            f"{record.form.describe()} and is {base.form.describe()} in this model, or has other "
            "values. Load the folder onto an unmodified base of its own with from_pretrained"
        )


# -- a LoRA of PEFT's beside our adapters


def as_pissa(config: LoraConfig) -> PissaConfig:
    """The configuration of an adapter of ours that is, and starts, as PEFT's LoRA of this one; a PissaConfig as it is.

    Raises:
        ValueError: naming a field that our adapters do not have, or of which PEFT decides later.
        TypeError: no LoraConfig.
    """
    if isinstance(config, PissaConfig):
        return copy.deepcopy(config)
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config must be a pissa.PissaConfig or a peft.LoraConfig, got {type(config).__name__}")
    if config.init_lora_weights is not True:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} is not supported beside a PiSSA adapter: leave it out, "
            "for LoRA's start, or give a pissa.PissaConfig with init"
        )
    if config.target_modules is None and not config.target_parameters:
        raise ValueError(
            "target_modules: got None, for which PEFT has a choice for each family of models; needed: the names, or "
            '"all-linear"'
        )
    return PissaConfig.from_lora(config, init="lora")


def read_plain_lora(folder: Path) -> tuple[PissaConfig, LoraFolder]:
    """A plain LoRA's configuration as one of ours, and what is in its folder.

    Raises:
        ValueError: naming the file, and the field or tensor that cannot be used.
    """
    found = open_adapter(folder)
    if not found.leaves_base or found.config["use_dora"]:
        name = "use_dora" if found.config["use_dora"] else "init_lora_weights"
        raise ValueError(
            f"{found.config_path} has {name}={found.config[name]!r}, and such an adapter is a plain LoRA only once it "
            "is converted, or merged: see pissa.convert, peft.PeftModel.merge_and_unload"
        )
    known = {field.name for field in dataclasses.fields(LoraConfig) if field.init} - {"runtime_config"}
    fields = {name: value for name, value in found.config.items() if name in known}
    try:
        config = LoraConfig(**fields)
        config.init_lora_weights = True  # the factors are in the file
        return as_pissa(config), found
    except (TypeError, ValueError) as error:
        raise ValueError(f"{found.config_path} cannot be used: {error}") from error


def load_factors(model: Any, adapter_name: str, found: LoraFolder) -> None:
    """Gives an adapter, which a PissaModel has just got, the factors of a plain LoRA: it starts from zero.

    Raises:
        ValueError: tensors that the adapter has no place for, other shapes, or embeddings of another base.
    """
    weights = found.weights
    tensors = {name: weights.read(name) for name in weights.entries}
    for key, table in vocabulary(model, adapter_name).items():
        value = tensors.pop(key, None)  # PEFT writes the base's own beside an adapter
        if value is not None and not torch.equal(value, table.value({}).to(value.dtype)):
            raise ValueError(
                f"{weights.path}: {key} is another one than the model's, which all its adapters share: load the "
                "adapter onto its own base, with peft.PeftModel.from_pretrained"
            )
    result = set_peft_model_state_dict(model, tensors, adapter_name)
    if result.unexpected_keys:
        raise ValueError(f"{weights.path}: the model has no place for tensor {result.unexpected_keys[0]}")


# -- what is to be known of the base


def base_doubts(
    folder: Path, narrower: Mapping[str, tuple[torch.dtype, torch.dtype]], other_bits: Iterable[str]
) -> list[PissaWarning]:
    """The warnings of a base that is not, bit for bit, the one of the training.

    Args:
        narrower: the layers whose base is in a dtype that does not hold its values, with that dtype and theirs.
        other_bits: the layers whose residual was made again, and has other bits.
    """
    found: list[PissaWarning] = []
    if narrower:
        name, (dtype, was) = next(iter(narrower.items()))
        found.append(
            OtherDtypeWarning(
                f"{folder} was written for a base in {was}, which is in {dtype} here: {len(narrower)} layers, {name} "
                "the first, differ by roundings, as far as a sample of their values shows. For the exact function, "
                f"load the base in {was}."
            )
        )
    if rounded := [name for name in other_bits if name not in narrower]:
        found.append(
            OtherRoundingWarning(
                f"The residual of {len(rounded)} layers, {rounded[0]} the first, differs in some bits from the one "
                f"that {folder} was trained with: this machine rounds differently. The function is the same up to the "
                "rounding of a few weights."
            )
        )
    return found
