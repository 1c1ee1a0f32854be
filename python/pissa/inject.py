"""Putting PissaLinear layers into a model: what can be adapted, where it starts, the way back on failure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm import tqdm

from pissa import ops
from pissa.config import IMPLICIT, PissaConfig
from pissa.layer import PissaLinear
from pissa.stored import StartFactors

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pissa_linear(target: nn.Module, adapter_name: str, config: PissaConfig, **kwargs: Any) -> PissaLinear:
    """The PissaLinear for `target`.

    Raises:
        TypeError, ValueError: naming the layer, why it cannot be adapted, and what to do instead.
    """
    name = kwargs["target_name"]
    if kwargs.get("parameter_name") is not None:
        raise TypeError(
            f"{name} is a parameter of {type(target).__name__} (fused experts, or their router), which PiSSA "
            "cannot adapt yet; name the linear layers to adapt in target_modules"
        )
    if type(target) is not nn.Linear:
        raise TypeError(_why_not(target, name))
    weight = target.weight
    if weight.is_meta:
        raise ValueError(
            f"the weight of {name} is on the meta device: load or materialise it first (a model that "
            "accelerate has offloaded has to be loaded without offloading)"
        )
    if type(weight) is not nn.Parameter or weight.dtype not in _DTYPES:
        raise TypeError(
            f"the weight of {name} is a {type(weight).__name__} of {weight.dtype}, but PiSSA decomposes "
            "plain float32, bfloat16 and float16 weights: load the model in one of these "
            '(quant="nf4" then stores it in 4 bits)'
        )
    return PissaLinear(target, adapter_name, config, **kwargs)


def _why_not(target: nn.Module, name: str) -> str:
    kind = f"{type(target).__module__}.{type(target).__qualname__}"
    if isinstance(target, BaseTunerLayer):
        return f"{name} already carries an adapter of another kind ({kind}); unload it first"
    if kind.startswith("bitsandbytes."):
        return (
            f"{name} is quantised already ({kind}): PiSSA quantises the residual, not the weight. Load the "
            'model in 16 or 32 bits and pass quant="nf4"'
        )
    return f"{name} is a {kind}; PiSSA adapts torch.nn.Linear for now; {_leave_out(name)}"


def _leave_out(name: str) -> str:
    return f"leave it out of target_modules or add {name.rpartition('.')[2]!r} to exclude_modules"


def pissa_layers(model: nn.Module, adapter_name: str) -> dict[str, PissaLinear]:
    """The layers of an (unwrapped) model that carry the adapter, by their name in the model."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PissaLinear) and adapter_name in module.lora_A
    }


# Elements of the layers that are decomposed at once, for each thread: enough for the threads to finish together, few
# enough for the bar to move, and for the dense weights (float32, 16 MB) that stored bases are decomposed from.
_GROUP = 1 << 22
# The same on a GPU, which decomposes weights of one shape together: some 30 of the layers of a 7B model.
_GPU_GROUP = 1 << 30


def decompose(model: nn.Module, adapter_name: str, config: PissaConfig, *, first: bool, progressbar: bool) -> None:
    """Starts an adapter that has just been injected from the principal singular vectors of each layer's base.

    `first`: the model has no other adapter, so that a dense base may still be replaced by a stored one.

    Raises:
        ValueError: naming the layer: NaN or Inf in its weight, a form that it cannot have.
    """
    layers = pissa_layers(model, adapter_name)
    _check_forms(model, layers, config, first)
    # tqdm reads TQDM_DISABLE only where it is not told whether to be disabled.
    with tqdm(total=len(layers), desc="PiSSA init", unit="layer") if progressbar else nullcontext() as bar:
        for group in _groups(layers):
            _start(group, adapter_name, config)
            if bar is not None:
                bar.update(len(group))


def _check_forms(model: nn.Module, layers: dict[str, PissaLinear], config: PissaConfig, first: bool) -> None:
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, layer in layers.items():
        if config.form in (IMPLICIT, layer.form):
            continue
        if not first or layer.form != IMPLICIT:
            raise ValueError(
                f"the base of layer {name} is {layer.form.describe()} and cannot become "
                f"{config.form.describe()}: other adapters are changes of the function that it has. "
                "Leave quant and residual out, and the adapter takes the base as it is"
            )
        if uses[id(layer.unmerged_base.weight)] > 1:
            raise ValueError(
                f"the weight of layer {name} is tied to another module, so it cannot be replaced by a "
                f"residual stored as {config.form.describe()}: use the implicit residual, untie the "
                "weight, or leave the layer out"
            )


def _groups(layers: dict[str, PissaLinear]) -> Iterator[dict[str, PissaLinear]]:
    """The layers, in order, in groups on one device of at most `_GROUP` elements a thread, `_GPU_GROUP` on a GPU, or of
    one layer that is larger."""
    group: dict[str, PissaLinear] = {}
    size = 0
    group_device = None
    for name, layer in layers.items():
        elements = layer.in_features * layer.out_features
        device = layer.unmerged_base.weight.device
        limit = _GROUP * torch.get_num_threads() if device.type == "cpu" else _GPU_GROUP
        if group and (size + elements > limit or device != group_device):
            yield group
            group, size = {}, 0
        group_device = device
        group[name] = layer
        size += elements
    if group:
        yield group


def _start(layers: dict[str, PissaLinear], adapter_name: str, config: PissaConfig) -> None:
    """Gives the adapter the start factors that a layer has already for its origin, or those of a decomposition."""
    origins = {name: layer.origin(adapter_name, config) for name, layer in layers.items()}
    known = {name: layer.known_start(origins[name]) for name, layer in layers.items()}
    unknown = [name for name, start in known.items() if start is None]
    splits = ops.split_many(
        [layers[name].dense_base() for name in unknown],
        [origins[name].r for name in unknown],
        [origins[name].scaling for name in unknown],
        svd=config.svd,
        passes=config.svd_passes,
        seed=config.seed,
        names=[f"layer {name}: weight" for name in unknown],
    )
    found = {name: StartFactors(split.a0, split.b0, origins[name]) for name, split in zip(unknown, splits, strict=True)}
    for name, layer in layers.items():
        layer.start_from(adapter_name, known[name] or found[name], config)


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Leaves `model` as it was when the block that adds an adapter fails: every module's attributes,
    children, parameters and hooks, and every parameter's flag.

    Nothing is copied, so a parameter that the block writes into is not restored; but the dense weights that
    it replaces stay in memory until it ends.
    """
    modules = [(module, vars(module).copy()) for module in model.modules()]
    # PEFT keeps one dictionary of configurations in several modules: its content is restored, in place.
    containers = [
        (value, value.copy())
        for _, attributes in modules
        for value in attributes.values()
        if isinstance(value, (dict, list))
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
            parameter.requires_grad_(flag)
        raise
