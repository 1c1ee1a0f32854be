"""An adapter as a plain LoRA in memory, for an engine that generates while the adapter is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from pissa.adapters.peft_layout import plain_config, plain_lora, rank_multiple
from pissa.adapters.save import warn_of_plain_lora
from pissa.base.start import ServedBase
from pissa.config import IMPLICIT
from pissa.distributed import is_partitioned, is_sharded, whole_tensor
from pissa.layers.layer import PissaLayer, pissa_layers
from pissa.model.pissa_model import PissaModel
from pissa.ops.checks import check_choice


def lora_state_dict(
    model: PissaModel, adapter_name: str | None = None, base: ServedBase = "original"
) -> dict[str, Tensor]:
    """Returns the current adapter as a plain LoRA under PEFT's names, for an engine that takes adapters from memory::

        tensors, config = pissa.lora_state_dict(model), pissa.lora_config(model)
        request = TensorLoRARequest(..., lora_tensors=tensors, peft_config=config.to_dict())  # verl's, for vLLM

    The factors are float32 copies on the layers' devices, of rank 2r, or of rank r for LoRA's start. Fused experts have
    PEFT's layout. Modules and tokens that are trained in addition to the adapter are included. vLLM's adapters support
    none of these three; it then needs the merged weights, model.merge_adapter().

    With several processes, all of them must call this function. The parameters may be sharded by FSDP2. Every process
    gets the result.

    Args:
        model: the PissaModel itself, not a trainer's wrapper around it.
        adapter_name: name of the adapter (default: the active one).
        base: the model that the engine serves. With "original", the unmodified model, the plain LoRA is exact unless
            the base is stored (`quant`, residual="explicit"); a warning says so, once for each model. With "residual",
            the stored base Q, it is exact: A and B of rank r if Q lacks this adapter's start, otherwise rank 2r.

    Returns:
        Tensors under their names in PEFT's adapter_model.safetensors.

    Raises:
        TypeError: `model` is not a PissaModel.
        ValueError: there is no such adapter; DeepSpeed has partitioned a parameter; with base="residual", the base is
            not stored, or lacks a start that does not fit into rank 2r together with the adapter.
    """
    name, layers = _served_layers(model, adapter_name, base)
    state = _gather_state(model, name)
    tensors: dict[str, Tensor] = get_peft_model_state_dict(
        model, state_dict=state, adapter_name=name, save_embedding_layers=False
    )
    tensors |= plain_lora(model.base_model.model, layers, name, state, base)
    if base == "original":
        warn_of_plain_lora(model)
    return tensors


def lora_config(model: PissaModel, adapter_name: str | None = None, base: ServedBase = "original") -> LoraConfig:
    """Returns the configuration for the result of `lora_state_dict` with the same arguments, and raises the same
    errors. An engine's limit on ranks must allow its `r`."""
    name, layers = _served_layers(model, adapter_name, base)
    times = rank_multiple(layers, name, base)
    return plain_config(model.base_model.model, model.peft_config[name], name, layers, times)


def _served_layers(model: Any, adapter_name: str | None, base: ServedBase) -> tuple[str, Mapping[str, PissaLayer]]:
    """The name of the adapter, and its layers, whose factors are checked to fit into a plain LoRA."""
    if not isinstance(model, PissaModel):
        raise TypeError(
            f"model must be a pissa.PissaModel, got {type(model).__name__}; accelerator.unwrap_model(model) takes off "
            "what a trainer has put around one"
        )
    check_choice("base", base, get_args(ServedBase))
    names = model.active_adapters if adapter_name is None else [adapter_name]
    if len(names) != 1:
        raise ValueError(f"adapter_name: several adapters are active; give one of {', '.join(map(repr, names))}")
    name = names[0]
    check_choice("adapter_name", name, model.peft_config)
    layers = pissa_layers(model.base_model.model, name)
    if base == "residual" and all(layer.base.form == IMPLICIT for layer in layers.values()):
        raise ValueError('base: got "residual", but the base is not stored: it is the unmodified model; leave base out')
    for key, layer in layers.items():
        starts, limit = layer.starts(name), 2 * layer.r[name]
        other, rank = starts.other_on(base), starts.rank_on(base)
        if other is not None and rank > limit:
            raise ValueError(
                f'base: got "residual", but the base of layer {key} lacks another start than that of adapter {name!r}, '
                f"of rank {other.origin.r}; both together have rank {rank}, and at most {limit} is possible: take "
                'base="original", or give the adapter LoRA\'s start and that rank'
            )
    return name, layers


def _gather_state(model: PissaModel, adapter_name: str) -> dict[str, Tensor]:
    """The model's state dict without sharded tensors that are not the adapter's. The adapter's own are gathered."""
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not is_sharded(value):
            state[name] = value
        elif adapter_name in name.split(".") or name.endswith(".bias"):
            if is_partitioned(value):
                raise ValueError(
                    f"{name} is partitioned by DeepSpeed. Call this on all ranks inside `with "
                    "deepspeed.zero.GatheredParameters(list(model.parameters())):`"
                )
            state[name] = whole_tensor(value)
    return state
