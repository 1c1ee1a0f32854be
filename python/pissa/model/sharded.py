"""An adapter in a model that fully_shard has sharded already (FSDP2).

FSDP manages the parameters that a module had when it was sharded, and no others. What an adapter trains stays whole in
every process, therefore, and its gradients are averaged here, as DDP does it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from pissa.config import PissaConfig
from pissa.distributed import average_gradient, is_managed
from pissa.layers.layer import pissa_layers


def reshard(model: nn.Module) -> None:
    """Frees the whole weights that FSDP keeps of the modules that it has computed with last.

    Raises:
        TypeError: the older FSDP holds the weights, in flat parameters.
    """
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
    """Checks that in a model that fully_shard has sharded nothing is trained beside the adapted layers' parameters.

    Raises:
        ValueError: naming the field of the configuration.
    """
    if not any(is_managed(module) for module in model.modules()):
        return
    asked = {
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
        "bias": config.bias != "none" and config.bias,
    }
    for field, value in asked.items():
        if value:
            raise ValueError(
                f"{field}={value!r} trains a part of the model itself, which fully_shard has sharded, beside "
                f"parameters that it does not know: wrap the model first and shard it then, or leave {field} out (a "
                "task type such as SEQ_CLS adds its head to modules_to_save)"
            )


def average_gradients(model: nn.Module, adapter_name: str) -> None:
    """Has the gradients of an adapter's parameters averaged over all processes, in every backward pass, where FSDP
    holds the base."""
    for layer in pissa_layers(model, adapter_name).values():
        if is_managed(layer.base.module):
            for entry in (entries[adapter_name] for entries in layer.dictionaries(adapter_name)):
                for parameter in [entry] if isinstance(entry, Tensor) else entry.parameters():
                    average_gradient(parameter)
