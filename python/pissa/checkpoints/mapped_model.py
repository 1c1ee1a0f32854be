"""A model over the mapped files of its folder: transformers' own loader, given tensors that nothing has read yet."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from pissa.checkpoints.packed import LEAVE_PACKED, Entries, packed_key, packed_layers, packed_weights, stack_key
from pissa.files.messages import first_line, shown
from pissa.files.model_folder import class_of, model_config
from pissa.files.source import Source
from pissa.layers.experts import WEIGHTS

GENERATION_CONFIG = "generation_config.json"


class MappedModel(NamedTuple):
    """A model whose tensors are views of the mapped files. One that transformers has cast, or put together of several,
    is a copy."""

    model: PreTrainedModel
    """On the CPU, in evaluation mode, with packed weights on the meta device."""
    packed: dict[str, Entries]
    """The entries of the packed weights, by the layers' names in the model."""
    quantization: Mapping[str, Any]
    """The `quantization_config` of the folder; the model has none."""


def mapped_model(source: Source, dtype: torch.dtype | None) -> MappedModel:
    """The model of a checkpoint.

    Args:
        dtype: of the floating tensors that are not packed; None: the one in the folder's config.json.

    Raises:
        ValueError: a folder that transformers cannot load, or whose tensors are not all of the model's.
    """
    folder = source.folder
    try:
        config = model_config(folder)
        kind = class_of(config)
        packed = packed_layers(source.names)
        quantization = vars(config).pop("quantization_config", {})
        experts = _packed_experts(kind, config, packed)
        if packed:
            config.quantization_config = LEAVE_PACKED
        generation = GenerationConfig.from_pretrained(folder) if (folder / GENERATION_CONFIG).is_file() else None
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=_state(source, packed, experts),
            dtype=dtype or "auto",
            generation_config=generation,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{folder} cannot be loaded by transformers: {first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} tensors of a {kind.__name__}, {shown(missing[0])} the first")
    entries = packed_weights(model) if packed else {}
    for layer in experts:
        entries[layer] = {name: source.read(tensor) for name, tensor in packed[layer].items()}
    model.config._name_or_path = model.name_or_path = str(folder)
    return MappedModel(model, entries, quantization)


def _state(source: Source, packed: Mapping[str, Mapping[str, str]], experts: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors under the names that transformers' loader is to find them by."""
    keys = {tensor: packed_key(layer, name) for layer, names in packed.items() for name, tensor in names.items()}
    inside = {tensor for layer in experts for tensor in packed[layer].values()}
    state = {keys.get(name, name): source.read(name) for name in source.names if name not in inside}
    return state | {stack_key(parameter): torch.empty(0) for parameter in experts.values()}


_EXPERT = re.compile(rf"(.+)\.\d+\.({'|'.join(WEIGHTS)})")


def _packed_experts(kind: Any, config: Any, packed: Iterable[str]) -> dict[str, str]:
    """The packed layers that the model has as parts of fused weights: each with the name of that parameter. `pissa
    init` calls them as they are called once they are unfused."""
    found = {layer: f"{match[1]}.{match[2]}" for layer in packed if (match := _EXPERT.fullmatch(layer))}
    if not found:
        return {}
    with torch.device("meta"):
        names = {name for name, _ in kind(config).named_parameters()}
    return {layer: parameter for layer, parameter in found.items() if parameter in names}
