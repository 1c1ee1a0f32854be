"""Injects an adapter's layers: checks and steps before and after PEFT inserts them, undone on failure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from pissa.base.classes import never_repack
from pissa.config import PissaConfig
from pissa.containers.checkpoint import check_not_residual
from pissa.containers.messages import quote
from pissa.distributed import average_gradient, is_managed
from pissa.layers.experts import unfuse_experts
from pissa.layers.factory import check_parents, choose_layers, layer_factory
from pissa.layers.layer import PissaLayer, pissa_layers
from pissa.layers.tokens import mend_token_layers
from pissa.peft_private import build_layers_with

# Parts of the parameter names of a model with adapters, and the word for "no adapter" in adapter_names.
_PEFTS_NAMES = {"base_model", "model", "base_layer", "modules_to_save", "original_module", "weight", "bias", "__base__"}
_PEFTS_NAMES |= set(PissaLayer.adapter_layer_names) | set(PissaLayer.other_param_names)


def check_adapter_name(name: str, model: nn.Module) -> None:
    """Raises ValueError unless `name` can be the name of a folder, a key of torch's module dictionaries, and a part of
    the parameter names in `model`, by which PEFT identifies the adapters in a state dict."""
    if (
        not isinstance(name, str)
        or not name.isprintable()  # printable names can also be encoded
        or not 0 < len(name.encode()) <= 200
        or set(name) & set("./\\")
    ):
        raise ValueError(
            f"adapter_name: got {quote(name)}; allowed: a string of 1 to 200 bytes, printable, without '.', '/' "
            "and '\\' [P027]"
        )
    names_in_use = {part for key, _ in model.named_parameters() for part in key.split(".")}
    if name in names_in_use | _PEFTS_NAMES or hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise ValueError(
            f"adapter_name: got {name!r}, which is part of the names of the model's parameters or an attribute of "
            f"torch's modules, so it could not be told apart; give another name, such as {name + '_1'!r} [P027]"
        )


def check_plain(model: nn.Module, adapter_name: str) -> None:
    """Raises ValueError for a model that is already wrapped, or in which no adapter can have that name."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "the model carries an adapter already, because wrapping changes it in place. To wrap it anew: model = "
            "model.unload() first, or load it again if its base was stored (quant, residual='explicit'); for a "
            "second adapter: model.add_adapter(name, config), model.load_adapter(folder, name) [P009]"
        )
    check_adapter_name(adapter_name, model)


def own_config(config: PissaConfig) -> PissaConfig:
    """Returns a copy, because PEFT writes into the configuration that it is given."""
    if not isinstance(config, PissaConfig):
        raise TypeError(f"config must be a pissa.PissaConfig, got {type(config).__name__} [P011]")
    return copy.deepcopy(config)


def drop_gguf_mark(model: nn.Module) -> None:
    """Marks a dense model as such that transformers has loaded from a GGUF file. If it has dequantised all weights, it
    still calls the model quantised by a method that cannot be trained or saved, and its Trainer refuses it."""
    is_dense = all(parameter.is_floating_point() for parameter in model.parameters())
    if getattr(model, "quantization_method", None) == "gguf" and is_dense:
        drop_quantization(model)


def drop_quantization(model: nn.Module) -> None:
    """Takes from a model of transformers, which is dense, what says that it is quantised."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(name, None)


def prepare(model: nn.Module, config: PissaConfig) -> None:
    """Prepares the (unwrapped) model and the configuration for PEFT, which then builds our layers for the targets. Like
    `complete`, raises TypeError or ValueError naming the layer that cannot be adapted."""
    check_not_residual(model)
    reshard(model)
    check_trained(model, config)
    build_layers_with(config, layer_factory(model))
    unfuse_experts(model, config)
    choose_layers(model, config)


def complete(model: nn.Module, config: PissaConfig, adapter_name: str) -> None:
    """Finishes the adapter that PEFT has injected. Afterwards, it lacks only its start factors."""
    mend_token_layers(model)
    never_repack(model)
    if config.modules_to_save:  # PEFT adds the names of a task's head whenever a model is made or restored
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    check_parents(model, adapter_name)
    check_trained(model, config)  # only now is a task's head known
    materialise(model, adapter_name)
    average_gradients(model, adapter_name)


def materialise(model: nn.Module, adapter_name: str) -> None:
    """Moves the parameters of a new adapter, which are zero, to the device where its layers compute. PEFT puts them on
    the device of the base's weights, which is the meta device for a base that accelerate offloads or that is to be
    filled later."""
    for layer in pissa_layers(model, adapter_name).values():
        device = layer.base.device
        for entries in layer.dictionaries(adapter_name):
            own = type(entries)({adapter_name: entries[adapter_name]})
            if any(parameter.is_meta for parameter in own.parameters()):
                for parameter in own.to_empty(device=device).parameters():
                    nn.init.zeros_(parameter)
                entries[adapter_name] = own[adapter_name]


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Restores `model` if the block, which adds an adapter, fails: every module's attributes, children, parameters and
    hooks, and every parameter's `requires_grad`.

    Nothing is copied. Therefore a parameter that the block writes into is not restored, and the dense weights that the
    block replaces stay in memory until it ends.
    """
    restore = way_back(model)
    try:
        yield
    except BaseException:
        restore()
        raise


def way_back(model: nn.Module) -> Callable[[], None]:
    """Returns a function that puts the model back into its current state, for `restored_on_error`."""
    modules = [(module, vars(module).copy()) for module in model.modules()]
    # PEFT shares one dictionary of configurations among several modules, and lists of adapter names among others. Their
    # content is restored in place.
    containers = [
        (value, dict(value.items()) if isinstance(value, dict) else value.copy())  # DeepSpeed's dict has no copy
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
            if parameter.requires_grad != flag:  # a lazily created parameter has a flag that cannot be set
                parameter.requires_grad_(flag)

    return restore


# ---- A model that fully_shard has sharded already (FSDP2) ------------------------------------------------------------
#
# FSDP manages only the parameters that a module had when it was sharded. Therefore an adapter's trained parameters stay
# whole in every process, and their gradients are averaged here, as in DDP.


def reshard(model: nn.Module) -> None:
    """Frees the whole weights that FSDP keeps for the modules with which it computed last. Raises TypeError if the
    older FSDP holds the weights, in flat parameters."""
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise TypeError(
                f"{name or 'the model'} is wrapped in FullyShardedDataParallel, which flattens its weights: wrap the "
                "model with PiSSA first, FullyShardedDataParallel(pissa.wrap(model, ...), use_orig_params=True), or "
                "shard it with fully_shard"
            )
        if isinstance(module, FSDPModule):
            module.reshard()


def check_trained(model: nn.Module, config: PissaConfig) -> None:
    """Raises ValueError, naming the field of the configuration, if a model that fully_shard has sharded trains anything
    besides the parameters of adapted layers."""
    if not any(is_managed(module) for module in model.modules()):
        return
    trained = {
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
        "bias": config.bias != "none" and config.bias,
    }
    for field, value in trained.items():
        if value:
            raise ValueError(
                f"{field}={value!r} trains a part of the model itself, which fully_shard has sharded, together "
                f"with parameters that it does not know: wrap the model first and shard it then, or leave {field} out "
                "(a task type such as SEQ_CLS adds its head to modules_to_save) [P049]"
            )


def average_gradients(model: nn.Module, adapter_name: str) -> None:
    """Averages the gradients of an adapter's parameters over all processes if FSDP holds the base."""
    for layer in pissa_layers(model, adapter_name).values():
        if is_managed(layer.base.module):
            for entries in layer.dictionaries(adapter_name):
                for parameter in type(entries)({adapter_name: entries[adapter_name]}).parameters():
                    average_gradient(parameter)
