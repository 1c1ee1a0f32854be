"""The packed weights of a checkpoint, and a model over its mapped files: transformers' own loader, given tensors that
nothing has read yet, leaves the packed ones packed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations import deepspeed
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from pissa.base.bitsandbytes import from_state
from pissa.base.bitsandbytes_state import ENTRIES
from pissa.files.messages import first_line, shown
from pissa.files.model_folder import class_of, model_config
from pissa.files.tensor_file import Source
from pissa.layers.experts import WEIGHTS

GENERATION_CONFIG = "generation_config.json"

Entries = dict[str, Tensor]
"""The entries of a layer's weight in bitsandbytes' state dict, as `base.bitsandbytes.from_state` takes them."""


def packed_layers(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The layers whose weights are packed in one of bitsandbytes' formats, by their names in the checkpoint: of each
    the names of its tensors, by those of the entries.

    Args:
        names: of all tensors.
    """
    present, found = set(names), {}
    for name in present:
        for mark, entries in ENTRIES.items():
            if mark in name:
                layer = name.partition(mark)[0]
                tensors = {entry: f"{layer}.{entry}" for entry in entries}
                found[layer] = {entry: tensor for entry, tensor in tensors.items() if tensor in present}
    return found


@contextmanager
def of_layer(name: str) -> Iterator[None]:
    """Names the layer in errors of the block.

    Raises:
        ValueError: for a ValueError.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {shown(name)}: {error}") from error


def mapped_model(
    source: Source, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, dict[str, Entries], Mapping[str, Any]]:
    """The model of a checkpoint, on the CPU, in evaluation mode. Its tensors are views of the mapped files, except for
    one that transformers has cast, or put together of several, which is a copy.

    Args:
        dtype: of the floating tensors that are not packed; None: the one in the folder's config.json.

    Returns:
        The model, whose packed weights are on the meta device; their entries, by the layers' names in the model; the
        `quantization_config` of the folder, which the model has not.

    Raises:
        ValueError: a folder that transformers cannot load, or whose tensors are not those of the model; a packed weight
            that is damaged, naming the layer.
    """
    folder, tensors = source.folder, packed_layers(source.names)
    packed = {layer: {entry: source.read(name) for entry, name in tensors[layer].items()} for layer in tensors}
    shapes = {}
    for layer, entries in packed.items():
        with of_layer(layer):
            shapes[layer] = from_state(entries).shape
    codes = {name for entries in tensors.values() for name in entries.values()}
    state: dict[str, Any] = {name: source.read(name) for name in source.names if name not in codes}
    try:
        config = model_config(folder)
        kind = class_of(config)
        quantization = vars(config).pop("quantization_config", {})
        left = _left_packed(kind, config, shapes)
        state |= {weight.name: weight for weight in left.values()}
        generation = GenerationConfig.from_pretrained(folder) if (folder / GENERATION_CONFIG).is_file() else None
        with _unpartitioned() if packed else nullcontext():
            model, info = kind.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=dtype or "auto",
                generation_config=generation,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{folder} cannot be loaded by transformers: {first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} tensors of a {kind.__name__}, {shown(missing[0])} the first")
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, needed = mismatched[0]
        raise ValueError(f"{folder}: {shown(name)} is {list(found)} in the folder and {list(needed)} in the model")
    model.config._name_or_path = model.name_or_path = str(folder)
    names = {id(parameter): name.removesuffix(".weight") for name, parameter in model.named_parameters()}
    used = {layer: weight for layer, weight in left.items() if id(weight.parameter) in names}
    of_model = {names[id(w.parameter)] if w.is_whole else layer: packed[layer] for layer, w in used.items()}
    return model, of_model, quantization


@contextmanager
def _unpartitioned() -> Iterator[None]:
    """Hides DeepSpeed's ZeRO-3 from transformers' loader, which would partition weights that are not there yet."""
    config = deepspeed._hf_deepspeed_config_weak_ref and deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


class _LeftPacked:
    """Stands in a state dict for a weight whose values are packed. transformers' loader slices what it is given, and
    moves it to a device and a dtype. What it gets of this is a parameter on the meta device.

    Args:
        name: of the tensor, in the checkpoint.
        is_whole: whether the weight is that of one layer; else it is fused of those of all experts.
    """

    def __init__(self, name: str, shape: Sequence[int], is_whole: bool) -> None:
        self.name, self.shape, self.is_whole = name, shape, is_whole
        self.parameter: nn.Parameter | None = None

    def __getitem__(self, _: object) -> _LeftPacked:
        return self

    def to(self, device: object, dtype: torch.dtype) -> nn.Parameter:
        self.parameter = nn.Parameter(torch.empty(self.shape, dtype=dtype, device="meta"))
        return self.parameter


_EXPERT = re.compile(rf"(.+)\.\d+\.({'|'.join(WEIGHTS)})")


def _left_packed(kind: Any, config: Any, shapes: Mapping[str, tuple[int, int]]) -> dict[str, _LeftPacked]:
    """The stand-ins of packed layers, given with their shapes. `pissa init` names experts as they are named once they
    are unfused; their stand-in is that of the fused weight."""
    left = {layer: _LeftPacked(f"{layer}.weight", shape, is_whole=True) for layer, shape in shapes.items()}
    experts = {layer: f"{match[1]}.{match[2]}" for layer in shapes if (match := _EXPERT.fullmatch(layer))}
    if experts:
        with torch.device("meta"):
            parameters = dict(kind(config).named_parameters())
        fused = {
            name: _LeftPacked(name, parameters[name].shape, is_whole=False)
            for name in parameters.keys() & experts.values()
        }
        left |= {layer: fused[name] for layer, name in experts.items() if name in fused}
    return left


@register_quantization_config("pissa")
class _ReadByLoad(QuantizationConfigMixin):  # type: ignore[misc]
    """Refuses a model whose experts are quantised: transformers would take them for missing, and draw them."""

    def __init__(self, **_: Any) -> None:
        raise ValueError("the experts of this model are quantised, which pissa.load(folder) reads, not from_pretrained")
