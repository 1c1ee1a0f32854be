"""Putting a saved adapter into a model, bit for bit. All of it is checked before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from pissa.base.digest import Match, dtype_of, holds
from pissa.base.stored import residuals_of
from pissa.base.weights import is_offloaded
from pissa.config import IMPLICIT
from pissa.distributed import is_dtensor, is_of_an_engine, is_partitioned, sharded_as
from pissa.files.checkpoint import Checkpoint, LayerTensors
from pissa.files.fit import base_doubts, check_base, check_form, check_headers, check_layers, check_vocabulary
from pissa.files.peft_layout import PREFIX, FactorTensors, is_of_a_layer
from pissa.files.pissa_layout import read_stored
from pissa.files.plain_lora import factors_of
from pissa.files.vocabulary import vocabulary
from pissa.layers.factory import check_values
from pissa.layers.layer import PissaLayer, pissa_layers
from pissa.ops import QuantizedWeight


def restore(checkpoint: Checkpoint, model: PeftModel, adapter_name: str) -> None:
    """Puts parameters and start factors into an adapter that the PissaModel has. Nothing is decomposed.

    Raises:
        ValueError: the base or the adapter is not the one that was saved, naming the first layer that differs, or a
            damaged file, naming file and tensor. Nothing has been changed then.
    """
    adapters = (parameter for name, parameter in model.named_parameters() if ".lora_" in name)
    if any(map(is_partitioned, adapters)) or any(map(is_of_an_engine, model.modules())):
        raise ValueError(
            "the model is partitioned by DeepSpeed ZeRO-3, its adapters too: load the adapter before "
            "deepspeed.initialize, or resume with the engine's load_checkpoint"
        )
    check_values(model.base_model.model, adapter_name)
    config, weights = checkpoint.config, checkpoint.weights
    layers = pissa_layers(model.base_model.model, adapter_name)
    alone = len(model.peft_config) == 1
    check_layers(checkpoint, layers, adapter_name)
    modules, embeddings = _beside_layers(model, adapter_name)
    tables = vocabulary(model, adapter_name)
    if partitioned := [
        key for key, table in tables.items() if key in weights.names and is_partitioned(table.parameter)
    ]:
        raise ValueError(
            f"{checkpoint.folder} has the base's {partitioned[0]}, which DeepSpeed ZeRO-3 has partitioned here. "
            "Load the model without zero.Init, the folder onto it, and let deepspeed.initialize partition it then"
        )
    embeddings |= {key: table.parameter for key, table in tables.items()}
    factors = factors_of(model.base_model.model, layers)
    check_headers(checkpoint, factors, layers, modules, embeddings)
    weights.expect_checksums()
    checkpoint.starts.expect_checksums()

    present = modules | embeddings
    others = {name: weights.read(name) for name in weights.names if name in present}
    tables = {key: table for key, table in tables.items() if key in others}
    residuals = _residuals(checkpoint, layers)
    # A weight that is kept as a residual, or will be, is compared by that.
    dense = {key: table for key, table in tables.items() if not table.is_stored}
    dense = {key: table for key, table in dense.items() if not any(table.is_of(layers[name]) for name in residuals)}
    check_vocabulary(checkpoint, dense, others, alone)
    new = dense if alone else {}
    narrower: dict[str, torch.dtype] = {}
    for name, layer in layers.items():
        weight = next(((key, others[key]) for key, table in new.items() if table.is_of(layer)), None)
        if check_base(checkpoint, name, layer, weight, residuals.get(name)) is Match.ROUNDED:
            narrower[name] = layer.dense_dtype
        form = checkpoint.records[name].form
        if form != layer.base.form and is_dtensor(layer.base.parameter):
            raise ValueError(
                f"{checkpoint.folder} keeps the base of layer {name} as {form.describe()}, and in the model its weight "
                "is sharded by fully_shard, which keeps it: load the folder first, and shard the model then"
            )
        is_fresh = alone and adapter_name not in layer.lora_start
        if not (is_fresh and layer.base.form == IMPLICIT):
            check_form(checkpoint, name, layer)
    tensors = _layer_tensors(checkpoint, factors, layers, adapter_name)

    for key, table in new.items():
        if not is_offloaded(table.module):
            table.put(others[key])
    other_bits = [
        name
        for name, layer in layers.items()
        if not _restore_layer(
            checkpoint, name, layer, tensors[name], residuals.get(name), name not in narrower, adapter_name
        )
    ]
    trained = {
        key: sharded_as(present[key], value)
        for key, value in others.items()
        if key in modules or (alone and key not in tables)
    }
    for field in ("init", "start_norm"):  # an adapter that was there may have started elsewhere
        setattr(model.peft_config[adapter_name], field, getattr(config, field))
    if trained:
        set_peft_model_state_dict(model, trained, adapter_name)
    for name in other_bits:
        layer = layers[name]
        if isinstance(layer.base.residual, Tensor) and not holds(
            layer.dense_dtype, dtype_of(checkpoint.records[name].weight)
        ):
            narrower[name] = layer.dense_dtype
    for doubt in base_doubts(checkpoint, narrower, other_bits):
        warnings.warn(doubt, stacklevel=3)  # the caller of from_pretrained or load_adapter


def _residuals(checkpoint: Checkpoint, layers: Mapping[str, PissaLayer]) -> dict[str, Tensor | QuantizedWeight]:
    """The residuals in the folder that dense bases are to be replaced by."""
    found = {}
    for name, layer in layers.items():
        record, base = checkpoint.records[name], layer.base
        if record.form != base.form:
            residual = read_stored(name, record, layer.matrix_shape, checkpoint.starts, base.device)
            if residual is not None:
                found[name] = residual
    return found


def _layer_tensors(
    checkpoint: Checkpoint, factors: list[FactorTensors], layers: Mapping[str, PissaLayer], adapter_name: str
) -> dict[str, LayerTensors]:
    found = {}
    for part in factors:
        a, b = (checkpoint.weights.read(key) for key in part.keys)
        for name, pair in part.unpack(a, b).items():
            found[name] = checkpoint.read_layer(name, *pair, layers[name].origin(adapter_name, checkpoint.config))
    return found


@torch.no_grad()
def _restore_layer(
    checkpoint: Checkpoint,
    name: str,
    layer: PissaLayer,
    tensors: LayerTensors,
    residual: Tensor | QuantizedWeight | None,
    is_same: bool,
    adapter_name: str,
) -> bool:
    """Puts the tensors into a layer, whose weight is the same as in the training or has other roundings. Returns
    whether its residual is then, bit for bit, the one of the training."""
    record = checkpoint.records[name]
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
        layer.store_base(residual, base, checkpoint.config)
        exact = layer.fingerprints.residual_is(layer.base, record.stored)
    layer.share_start(adapter_name, tensors.start.to(device))
    for delta, saved in zip(layer.deltas(adapter_name), tensors.deltas, strict=True):
        if delta is not None and saved is not None:
            delta.copy_(sharded_as(delta, saved))
    if tensors.magnitude is not None:
        layer.magnitude(adapter_name).set(*tensors.magnitude)
    return exact


def _beside_layers(model: PeftModel, adapter_name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's tensors that PEFT's file may hold beside those of the layers, under PEFT's names: `modules_to_save`
    and trained tokens, and embeddings, which PEFT saves if it is asked to or if they were resized."""
    adapted = pissa_layers(model.base_model.model)
    layers = pissa_layers(model.base_model.model, adapter_name)
    trained = {f"{PREFIX}{name}.{key}" for name, layer in layers.items() for key in layer.state_keys(adapter_name)}
    state = {key: value for key, value in model.state_dict().items() if key not in trained}
    modules, with_embeddings = (
        {
            key: value
            for key, value in get_peft_model_state_dict(
                model, state_dict=state, adapter_name=adapter_name, save_embedding_layers=embeddings
            ).items()
            if not is_of_a_layer(key, adapted)
        }
        for embeddings in (False, _has_input_embeddings(model))
    )
    return modules, {key: value for key, value in with_embeddings.items() if key not in modules}


def _has_input_embeddings(model: PeftModel) -> bool:
    try:
        return hasattr(model, "get_input_embeddings") and model.get_input_embeddings() is not None
    except NotImplementedError:  # by a model of images, which has the method all the same
        return False
