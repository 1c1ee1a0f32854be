"""The packed weights of a checkpoint: which tensors are the codes and scales of one weight, and a loader of
transformers' that leaves them packed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pissa.base.bitsandbytes_state import ENTRIES

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


_MARK = ".packed."
_STACK = "stack"
_ENTRIES = {
    re.escape(_MARK + entry): entry
    for entry in sorted({_STACK, *(entry for entries in ENTRIES.values() for entry in entries)}, reverse=True)
}
"""The entries, by the patterns of the names under which transformers' loader is given them. Of two that a name begins
with, transformers 5.20 takes the first: no entry stands before one that it is the beginning of."""


def packed_key(layer: str, entry: str) -> str:
    """The name under which transformers' loader is given an entry of a layer's weight."""
    return f"{layer}.weight{_MARK}{entry}"


def stack_key(parameter: str) -> str:
    """The name under which it is given any tensor, for a parameter of the model whose matrices are all packed."""
    return f"{parameter}{_MARK}{_STACK}"


LEAVE_PACKED = {"quant_method": "pissa", "is_mapped": True}
"""The `quantization_config` of a model whose packed weights are to stay packed."""


def packed_weights(model: PreTrainedModel) -> dict[str, Entries]:
    """The entries of the packed weights, by the layers' names in a model that was loaded with LEAVE_PACKED.

    The weights of these layers are on the meta device. The model keeps no sign of having been loaded so: what becomes
    of the layers, their bases know.
    """
    quantizer = model.hf_quantizer
    conversions = [one for one in model._weight_conversions if not _is_ours(one)]
    quantizer.remove_quantization_config(model)
    model._weight_conversions = conversions  # which save_pretrained reverts
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module.config).pop("_is_quantized", None)
    return {name: vars(module).pop(_KEPT) for name, module in model.named_modules() if _KEPT in vars(module)}


_KEPT = "pissa_packed"
"""The attribute in which a module keeps its entries while the model is loaded."""


@register_quantization_config("pissa")
class _LeavePacked(QuantizationConfigMixin):  # type: ignore[misc]
    def __init__(self, is_mapped: bool = False, **_: Any) -> None:
        self.quant_method, self.is_mapped = "pissa", is_mapped


@register_quantizer("pissa")
class _Loader(HfQuantizer):  # type: ignore[misc]
    """transformers' loader renames, casts and places all other tensors, as always. It gives the entries to `_Keep`."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.quantization_config.is_mapped:
            raise ValueError(
                "the experts of this model are quantised, which pissa.load(folder) reads, not from_pretrained"
            )

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    def get_weight_conversions(self) -> list[WeightConverter]:
        return [WeightConverter(list(_ENTRIES), "", [_Keep(self)])]


class _Keep(ConversionOps):  # type: ignore[misc]
    """Keeps the entries of one weight with its module, and leaves the parameter where it is, on the meta device."""

    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer  # transformers casts nothing that is for an operation with it

    def convert(
        self, input_dict: dict[str, list[Tensor]], *, full_layer_name: str, model: nn.Module, **_: Any
    ) -> dict[str, Tensor]:
        module: Any = model.get_submodule(full_layer_name.rpartition(".")[0])
        module._is_hf_initialized = True
        entries = {_ENTRIES[pattern]: tensor for pattern, [tensor] in input_dict.items()}
        if _STACK not in entries:
            setattr(module, _KEPT, entries)
        return {full_layer_name: model.get_parameter(full_layer_name)}


def _is_ours(conversion: Any) -> bool:
    return any(isinstance(one, _Keep) for one in getattr(conversion, "operations", ()))
