"""A model over the mapped files of its folder: transformers' own loader, given tensors that nothing has read yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from pissa.checkpoints.packed import LEAVE_PACKED, Entries, packed_key, packed_layers, packed_weights
from pissa.files.messages import first_line, shown
from pissa.files.source import Source

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
        config = AutoConfig.from_pretrained(folder)
        kind = _model_class(config)
        packed = packed_layers(source.names)
        quantization = getattr(config, "quantization_config", None) or {}
        if packed:
            config.quantization_config = LEAVE_PACKED
        generation = GenerationConfig.from_pretrained(folder) if (folder / GENERATION_CONFIG).is_file() else None
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=_state(source, packed),
            dtype=dtype or "auto",
            generation_config=generation,
            output_loading_info=True,
        )
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"{folder} cannot be loaded by transformers: {first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} tensors of a {kind.__name__}, {shown(missing[0])} the first")
    entries = packed_weights(model) if packed else {}
    model.config._name_or_path = model.name_or_path = str(folder)
    return MappedModel(model, entries, quantization)


def _model_class(config: Any) -> Any:
    """transformers' class that config.json names."""
    for name in config.architectures or ():
        if isinstance(kind := getattr(transformers, name, None), type) and issubclass(kind, PreTrainedModel):
            return kind
    raise ValueError(
        f"config.json: architectures is {shown(config.architectures)}; needed: a class of transformers "
        f"{transformers.__version__}, such as LlamaForCausalLM"
    )


def _state(source: Source, packed: dict[str, dict[str, str]]) -> dict[str, Tensor]:
    """The tensors under the names that transformers' loader is to find them by."""
    keys = {tensor: packed_key(layer, entry) for layer, tensors in packed.items() for entry, tensor in tensors.items()}
    return {keys.get(name, name): source.read(name) for name in source.names}
