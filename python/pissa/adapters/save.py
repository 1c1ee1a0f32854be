"""Writes adapters: files of our own that an exact resume needs, and a plain LoRA for every other runtime. Loading never
repeats the SVD. `pissa_layout` describes the files.

All that a training changes is in one file, so a crash between two renames leaves the old or the new adapter. Checksums
in each file show whether it is unchanged.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig

from pissa import notices
from pissa.adapters.peft_layout import (
    ADAPTER_WEIGHTS,
    base_weight_key,
    inexact_lora,
    magnitude_key,
    plain_config,
    plain_config_text,
    plain_lora,
    rank_multiple,
    select_trained_beside,
)
from pissa.adapters.pissa_layout import MARK, PISSA_WEIGHTS, AdapterRecord, LayerRecord, layer_tensors
from pissa.adapters.vocabulary import vocabulary
from pissa.base.protocol import unshard
from pissa.base.stored import residual_tensors
from pissa.config import IMPLICIT
from pissa.containers.checkpoint import PISSA_RECORD
from pissa.containers.recognise import ADAPTER_CONFIG
from pissa.containers.staged import staged, write_text
from pissa.containers.tensor_file import write_tensors
from pissa.distributed import check_whole, is_sharded
from pissa.layers.layer import PissaLayer, pissa_layers


def save_adapter(
    model: PeftModel,
    adapter_name: str,
    directory: str | os.PathLike[str],
    state_dict: dict[str, Tensor] | None,
    save_embedding_layers: str | bool,
) -> None:
    """Writes one adapter to `directory` or, unless it is called "default", to a sub-folder of its name."""
    config, base = model.peft_config[adapter_name], model.base_model.model
    layers = pissa_layers(base, adapter_name)
    with_vocabulary = _with_vocabulary(model, adapter_name, layers, save_embedding_layers)
    state = _own_state(model) if state_dict is None else state_dict
    check_whole(state)
    tensors = select_trained_beside(model, adapter_name, layers, state)
    gathered = {name: (state_dict or {}).get(base_weight_key(name)) for name in layers}
    table = vocabulary(model, adapter_name) if with_vocabulary else {}
    tensors |= {key: tensor.value(state_dict or {}) for key, tensor in table.items()}
    check_whole(tensors)
    lora = tensors | plain_lora(base, layers, adapter_name, state)
    for name, layer in layers.items():
        tensors |= (parts := layer_tensors(name, layer, adapter_name, config, state))
        if config.use_dora:
            lora[magnitude_key(name)] = parts[f"{name}.magnitude"]
    records = {name: LayerRecord.of(layer, adapter_name, gathered[name]) for name, layer in layers.items()}
    rest = model.rest.fingerprints(base, {id(tensor.parameter) for tensor in table.values() if not tensor.is_stored})
    alone = {id(tensor.module) for tensor in table.values() if tensor.is_stored}
    codes: dict[str, Tensor] = {}  # residuals that cannot be made again from weight or inputs
    fingerprints: dict[str, str] = {}
    for name, layer in layers.items():
        if id(layer.base.module) in alone or layer.base.has_own_codes:
            residual = unshard(layer.base, gathered[name]).residual
            if residual is not None:
                codes |= {f"{name}.{part}": tensor for part, tensor in residual_tensors(residual).items()}
                fingerprints[name] = str(records[name].stored)
    folder = Path(directory) / ("" if adapter_name == "default" else adapter_name)
    with staged(folder) as new:
        digest = model.codes_file.write(folder, new, codes, fingerprints) if codes else None
        text = AdapterRecord(config, records, rest, digest).text()
        digest = write_tensors(new(PISSA_WEIGHTS), _on_cpu(tensors), {MARK: text})
        write_text(new(PISSA_RECORD), text)
        plain = plain_config(base, config, adapter_name, layers, rank_multiple(layers, adapter_name))
        write_text(new(ADAPTER_CONFIG), plain_config_text(plain, _class_of(base)))
        write_tensors(new(ADAPTER_WEIGHTS), _on_cpu(lora), {MARK: digest})


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, copied from a GPU only once, because the checksum and the file each read them."""
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _with_vocabulary(
    model: PeftModel, adapter_name: str, layers: Mapping[str, PissaLayer], save_embedding_layers: str | bool
) -> bool:
    """Whether the vocabulary's weights are written with the adapter.

    With "auto" they are if the vocabulary's size differs from that in the files from which the base was loaded, or if
    these are not available. A base of no files has them written if the adapter changes the vocabulary. (PEFT's own
    "auto" asks the Hub, and writes them with every adapter that targets embeddings.)
    """
    if save_embedding_layers is True and not vocabulary(model, adapter_name):
        warnings.warn(
            "Could not identify embedding layer(s) because the model is not a 🤗 transformers model.",  # PEFT's words
            notices.NoEmbeddingsWarning,
            stacklevel=4,
        )
    if isinstance(save_embedding_layers, bool):
        return save_embedding_layers
    if save_embedding_layers != "auto":
        raise ValueError(f'save_embedding_layers must be "auto", True or False, got {save_embedding_layers!r}')
    if model.vocabulary_was_resized or model.is_from_files:  # since it was wrapped, which pissa.load does at once
        return bool(model.vocabulary_was_resized)
    base = model.base_model.model
    name = str(getattr(base, "name_or_path", None) or model.peft_config[adapter_name].base_model_name_or_path or "")
    config = getattr(base, "config", None)
    if isinstance(config, PretrainedConfig) and name:
        with suppress(OSError, ValueError, AttributeError):
            fields, _ = config.get_config_dict(name, local_files_only=True)  # where the model was loaded from
            if fields:
                before = type(config).from_dict(fields)
                return bool(before.get_text_config().vocab_size != config.get_text_config().vocab_size)
    tables = vocabulary(model, adapter_name).values()
    return bool(name) or any(tensor.is_of(layer) for tensor in tables for layer in layers.values())


def _class_of(model: nn.Module) -> type[nn.Module]:
    """The class of a model before fully_shard, which replaces it by a class of its own."""
    ancestors = (ancestor for ancestor in type(model).__mro__ if issubclass(ancestor, nn.Module))
    return next(ancestor for ancestor in ancestors if not issubclass(ancestor, FSDPModule))


def _own_state(model: PeftModel) -> dict[str, Tensor]:
    """The state dict of a model, without frozen base weights that are sharded. (PEFT would gather them, but the other
    processes may not be here.)"""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    parts = (".lora_", ".modules_to_save.", ".trainable_tokens_")
    base = {name for name, value in parameters.items() if not value.requires_grad and not any(p in name for p in parts)}
    check_whole({name: value for name, value in parameters.items() if name not in base})
    return {
        name: value
        for name, value in model.state_dict().items()
        if name not in base or not is_sharded(parameters[name])
    }


def warn_of_plain_lora(model: PeftModel) -> None:
    """Warns, once for each PissaModel, if other runtimes do not compute the function that was trained."""
    bases = [layer.base for layer in pissa_layers(model.base_model.model).values()]
    forms = {
        base.form.name
        for base in bases
        if base.form != IMPLICIT and not (base.form.name == "explicit" and base.dtype == torch.float32)
    }
    if forms and not model.warned_of_plain_lora:
        model.warned_of_plain_lora = True
        warnings.warn(inexact_lora(forms), notices.InexactLoraWarning, stacklevel=3)
