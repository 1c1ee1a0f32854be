"""The base's own embeddings and output layer, written with an adapter. `resize_token_embeddings` adds random rows, so
resizing the base again would not give the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from pissa.adapters.peft_layout import PREFIX
from pissa.base.classes import base_of
from pissa.base.protocol import unshard
from pissa.base.weights import in_memory
from pissa.config import IMPLICIT
from pissa.distributed import check_whole, shard_as, whole_shape
from pissa.layers.layer import PissaLayer
from pissa.layers.tokens import TrainableTokensLayer, TrainableTokensWrapper


@dataclass(frozen=True)
class VocabularyTensor:
    """A parameter of the input embeddings or of the output layer. A weight may be stored as a residual."""

    module: nn.Module
    name: str
    """"weight" or "bias"."""
    state_key: str
    """Its name in the model's state dict."""
    tokens: TrainableTokensLayer | None
    """The layer that trains some of its rows."""

    @property
    def is_stored(self) -> bool:
        """Whether the weight is stored as a residual."""
        return self.name == "weight" and base_of(self.module).form != IMPLICIT

    @property
    def parameter(self) -> Tensor:
        """The parameter or, for a stored weight, a meta tensor of its shape and dtype."""
        base = base_of(self.module)
        if self.name == "weight" and base.start is not None:
            return torch.empty(len(base.start.b0), base.start.a0.shape[1], dtype=base.dtype, device="meta")
        return cast(Tensor, getattr(self.module, self.name))

    def is_of(self, layer: PissaLayer) -> bool:
        """Whether it is the weight of the layer's base."""
        base = layer.base
        return self.name == "weight" and (base.module is self.module or base.parameter is self.module.weight)

    def value(self, state: Mapping[str, Tensor]) -> Tensor:
        """The base's own values, on the CPU, whether or not adapters are merged; from a state dict if one was
        gathered."""
        gathered = state.get(self.state_key)
        with in_memory(self.module):
            if self.name == "bias":
                bias = self.parameter if gathered is None else gathered
                check_whole({self.state_key: bias})
                return bias.detach().cpu()
            base = unshard(base_of(self.module), gathered)
            value = (base_of(base.restore_module()) if self.is_stored else base).parameter.detach()
            if self.tokens is not None:
                value = self.tokens.unmerge_weight(value)
            return value.cpu()

    @torch.no_grad()
    def put(self, value: Tensor) -> None:
        """Sets the parameter to these values."""
        self.parameter.copy_(shard_as(self.parameter, value))
        if self.tokens is not None and self.name == "weight":
            self.tokens.store_originals()


def vocabulary(model: PeftModel, adapter_name: str) -> dict[str, VocabularyTensor]:
    """The parameters of the input embeddings and the output layer, by their names in PEFT's file of the adapter."""
    base = model.base_model.model
    names = {id(module): name for name, module in base.named_modules()}
    tensors = {}
    for module in _embeddings(base):
        if id(module) not in names:
            continue
        infix, inner, tokens = _unwrap(module, adapter_name)
        if not _is_dense(inner):
            continue
        for name, _ in inner.named_parameters(recurse=False):
            state_key = f"{PREFIX}{names[id(inner)]}.{name}"
            key = f"{PREFIX}{names[id(module)]}{infix}.{name}"
            tensors[key] = VocabularyTensor(inner, name, state_key, tokens)
    return tensors


def _embeddings(base: Any) -> Iterator[nn.Module]:
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(base, getter)()
        except (AttributeError, NotImplementedError):  # models from other libraries, or without such a layer
            continue
        if isinstance(module, nn.Module):
            yield module


def _unwrap(module: nn.Module, adapter_name: str) -> tuple[str, nn.Module, TrainableTokensLayer | None]:
    """The name in PEFT's file after the module's, the base's own module in it, and the layer that trains tokens."""
    infix, inner, tokens, is_of_the_adapter = "", module, None, False
    if isinstance(module, PissaLayer):
        infix, inner, is_of_the_adapter = ".base_layer", module.base.module, adapter_name in module.r
    elif isinstance(module, TrainableTokensWrapper):
        tokens = module.token_adapter
        infix, inner, is_of_the_adapter = ".token_adapter.base_layer", tokens.base_layer, module.trains(adapter_name)
    elif isinstance(module, ModulesToSaveWrapper):
        infix, inner = ".original_module", module.original_module
        is_of_the_adapter = adapter_name in module.modules_to_save
    return infix if is_of_the_adapter else "", inner, tokens


def _is_dense(module: Any) -> bool:
    """Whether the module's weight is a table of numbers, which may have been resized."""
    base = base_of(module)
    if base.form != IMPLICIT:
        return True
    weight = getattr(module, "weight", None)
    is_table = isinstance(weight, Tensor) and len(whole_shape(weight)) == 2 and weight.is_floating_point()
    return is_table and not base.is_quantised
