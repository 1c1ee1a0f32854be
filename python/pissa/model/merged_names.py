"""The parameters of a merged model under the names that the model has without adapters. TRL, for one, sends them to the
engine that generates: it merges, takes "base_layer" out of the names, and leaves out what is LoRA's."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from pissa.files.peft_layout import PREFIX
from pissa.layers.experts import unfused_experts
from pissa.layers.layer import pissa_layers
from pissa.layers.tokens import TrainableTokensWrapper


def is_merged(base: nn.Module) -> bool:
    """Whether adapters are merged into an (unwrapped) model."""
    return any(layer.merged for layer in pissa_layers(base).values())


def with_unwrapped_names(base: nn.Module, named: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a PissaModel over the (unwrapped) model `base`, which is merged. The experts that we have made
    linear layers are one parameter again, a copy; trained tokens are in their embedding's weight alone."""
    experts = {f"{PREFIX}{path}.": module for path, module in unfused_experts(base).items()}
    tokens = [f"{PREFIX}{name}." for name, module in base.named_modules() if isinstance(module, TrainableTokensWrapper)]
    for name, parameter in named:
        if path := next((path for path in experts if name.startswith(path)), None):
            module, rest = experts[path], name.removeprefix(path)
            index, _, inner = rest.partition(".")
            if index == "fused":
                yield path + inner, parameter
            elif "lora_" in inner:
                yield name, parameter
            elif index == "0":
                weight = inner.partition(".")[0]
                yield path + weight, module.fused_weight(weight)
        elif path := next((path for path in tokens if name.startswith(path)), None):
            if "trainable_tokens" not in name:
                yield path + name.removeprefix(f"{path}token_adapter."), parameter
        else:
            yield name, parameter
