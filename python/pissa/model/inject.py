"""The injection of an adapter's layers: what is done before and after PEFT puts them in, the way back on failure."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pissa.config import PissaConfig
from pissa.layers.experts import unfuse
from pissa.layers.factory import check_parents, choose_layers, layer_factory
from pissa.layers.layer import pissa_layers
from pissa.layers.tokens import mend_token_layers
from pissa.notices import DropoutWarning
from pissa.peft_private import build_layers_with


def own_config(config: PissaConfig) -> PissaConfig:
    """A copy, since PEFT writes into the configuration that it is given."""
    if not isinstance(config, PissaConfig):
        raise TypeError(f"config must be a pissa.PissaConfig, got {type(config).__name__}")
    return copy.deepcopy(config)


def warn_of_dropout(config: PissaConfig) -> None:
    """Warns the caller's caller of `lora_dropout`, where an adapter starts from more than zero."""
    if config.lora_dropout > 0 and config.init != "lora":
        warnings.warn(
            f"lora_dropout={config.lora_dropout}: the paper trains PiSSA without dropout. It is applied to the input "
            "of the change only, not to the principal part that the adapter starts from.",
            DropoutWarning,
            stacklevel=3,
        )


def prepare(model: nn.Module, config: PissaConfig) -> None:
    """Readies the (unwrapped) model and the configuration for PEFT, which then builds our layers for the targets.

    Raises:
        TypeError, ValueError: naming the layer that cannot be adapted.
    """
    build_layers_with(config, layer_factory(model))
    unfuse(model, config)
    choose_layers(model, config)


def complete(model: nn.Module, config: PissaConfig, adapter_name: str) -> None:
    """Finishes what PEFT has injected. The adapter then lacks its start factors only.

    Raises:
        TypeError, ValueError: naming the layer that cannot be adapted.
    """
    mend_token_layers(model)
    if config.modules_to_save:  # PEFT adds the names of a task's head each time that a model is made, restored ones too
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    check_parents(model, adapter_name)
    materialise(model, adapter_name)


def materialise(model: nn.Module, adapter_name: str) -> None:
    """Puts the parameters of a new adapter, which are zero, where its layers compute. PEFT puts them where the base's
    weights are; for a base that accelerate offloads, or that is to be filled later, that is the meta device."""
    for layer in pissa_layers(model, adapter_name).values():
        device = layer.base.device
        parts = [getattr(layer, name) for name in layer.adapter_layer_names]
        for part in (part for part in parts if adapter_name in part):
            found = part[adapter_name]
            if isinstance(found, Tensor):
                if found.is_meta:
                    zeros = torch.zeros_like(found, device=device)
                    part[adapter_name] = nn.Parameter(zeros, requires_grad=found.requires_grad)
            elif any(parameter.is_meta for parameter in found.parameters()):
                for parameter in found.to_empty(device=device).parameters():
                    nn.init.zeros_(parameter)


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Leaves `model` as it was if the block, which adds an adapter, fails: every module's attributes, children,
    parameters and hooks, and every parameter's `requires_grad`.

    Nothing is copied. A parameter that the block writes into is therefore not restored, and the dense weights that the
    block replaces stay in memory until it ends.
    """
    restore = _way_back(model)
    try:
        yield
    except BaseException:
        restore()
        raise


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Leaves `model` as it was, whatever the block does, as `restored_on_error`."""
    restore = _way_back(model)
    try:
        yield
    finally:
        restore()


def _way_back(model: nn.Module) -> Callable[[], None]:
    """Puts the model back into the state of now."""
    modules = [(module, vars(module).copy()) for module in model.modules()]
    # PEFT shares one dictionary of configurations among several modules, and lists of adapters' names among others.
    # Their content is restored in place.
    containers = [
        (value, value.copy())
        for _, attributes in modules
        for value in attributes.values()
        if isinstance(value, (dict, list, set))
    ]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for module, attributes in modules:
            vars(module).clear()
            vars(module).update(attributes)
        for container, content in containers:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, flag in flags:
            if parameter.requires_grad != flag:  # a parameter that torch makes lazily can be asked, but not told
                parameter.requires_grad_(flag)

    return restore
