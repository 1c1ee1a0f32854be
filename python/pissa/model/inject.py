"""PissaLayers in a model: putting their parameters in place, the way back on failure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pissa.base.weights import execution_device
from pissa.layers.layer import pissa_layers


def materialise(model: nn.Module, adapter_name: str) -> None:
    """Puts the parameters of a new adapter, which are zero, where its layers compute: PEFT takes them to the base's
    weights, which for a base that accelerate offloads is the meta device."""
    for layer in pissa_layers(model, adapter_name).values():
        device = execution_device(layer.unmerged_base)
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
    """Leaves `model` as it was when the block that adds an adapter fails: every module's attributes,
    children, parameters and hooks, and every parameter's flag.

    Nothing is copied, so a parameter that the block writes into is not restored; but the dense weights that
    it replaces stay in memory until it ends.
    """
    modules = [(module, vars(module).copy()) for module in model.modules()]
    # PEFT keeps one dictionary of configurations in several modules, and the names of its adapters in others: the
    # content is restored, in place.
    containers = [
        (value, value.copy())
        for _, attributes in modules
        for value in attributes.values()
        if isinstance(value, (dict, list, set))
    ]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, attributes in modules:
            vars(module).clear()
            vars(module).update(attributes)
        for container, content in containers:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, flag in flags:
            if parameter.requires_grad != flag:  # a parameter that torch makes lazily can be asked, but not told
                parameter.requires_grad_(flag)
        raise
