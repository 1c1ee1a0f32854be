"""An adapter as a plain LoRA in memory, for an engine that generates while the adapter is trained."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from pissa.base.start import StartFactors
from pissa.config import IMPLICIT
from pissa.distributed import is_partitioned, is_sharded, whole_tensor
from pissa.files.peft_layout import PREFIX, factors_of, plain_config
from pissa.files.save import warn_of_plain_lora
from pissa.layers.layer import PissaLayer, pissa_layers
from pissa.model.pissa_model import PissaModel
from pissa.ops.checks import check_choice
from pissa.ops.low_rank import pad_rank

ServedBase = Literal["original", "residual"]


def lora_state_dict(
    model: PissaModel, adapter_name: str | None = None, base: ServedBase = "original"
) -> dict[str, Tensor]:
    """The adapter as it is now, as a plain LoRA under PEFT's names, for an engine that takes adapters from memory::

        tensors, config = pissa.lora_state_dict(model), pissa.lora_config(model)
        request = TensorLoRARequest(..., lora_tensors=tensors, peft_config=config.to_dict())  # verl's, for vLLM

    The factors are float32 copies on the layers' devices, of rank 2r, or of rank r for LoRA's start. Fused experts have
    PEFT's layout. Modules and tokens that are trained beside the adapter are there, too. vLLM's adapters can have none
    of these three: it needs the merged weights then, model.merge_adapter().

    With several processes all of them have to call this. The parameters may be sharded by FSDP2; each has the result.

    Args:
        model: the PissaModel itself, not what a trainer has put around it.
        adapter_name: by default the active adapter.
        base: what the engine serves. With "original", the unmodified model, the plain LoRA is exact unless the base is
            stored (`quant`, residual="explicit"); a warning says so then, once for each model. With "residual", the
            stored base Q, it is exact: A and B of rank r if Q lacks this adapter's start, else rank 2r.

    Returns:
        Tensors by the names that they have in PEFT's adapter_model.safetensors.

    Raises:
        TypeError: no PissaModel.
        ValueError: no such adapter; a parameter that DeepSpeed has partitioned; with base="residual", a base that is
            not stored, or one that lacks a start which does not fit into rank 2r with the adapter.
    """
    name, times, served = _adapter(model, adapter_name, base)
    state = _whole(model, name)
    found: dict[str, Tensor] = get_peft_model_state_dict(
        model, state_dict=state, adapter_name=name, save_embedding_layers=False
    )
    factors, layers = {}, {key: one.layer for key, one in served.items()}
    for key, (layer, keeps_start, of_base, ratio) in served.items():
        taken = None if of_base is None else (of_base.a0, of_base.b0)
        deltas = layer.deltas_in(state, f"{PREFIX}{key}.", name)
        pair = layer.start_of(name).factors_on(deltas, keeps_start, taken, ratio)
        factors[key] = pad_rank(*pair, times * layer.r[name])
    for part in factors_of(model.base_model.model, layers):
        found |= part.pack([factors[key] for key in part.layers])
    if base == "original":
        warn_of_plain_lora(model)
    return found


def lora_config(model: PissaModel, adapter_name: str | None = None, base: ServedBase = "original") -> LoraConfig:
    """The configuration of what `lora_state_dict` gives for the same arguments, which raises the same errors. An
    engine's limit of ranks has to allow its `r`."""
    name, times, served = _adapter(model, adapter_name, base)
    layers = {key: one.layer for key, one in served.items()}
    return plain_config(model.base_model.model, model.peft_config[name], name, layers, times)


class _Served(NamedTuple):
    """How a layer's adapter is a plain LoRA on the weight that an engine serves."""

    layer: PissaLayer
    keeps_start: bool
    """Whether the engine's weight lacks B0 A0, or that is zero: then B A is the whole change."""
    of_base: StartFactors | None
    """Another start that is taken out of that weight."""
    ratio: float
    """Of its scaling to the adapter's."""


def _adapter(model: Any, adapter_name: str | None, base: ServedBase) -> tuple[str, int, dict[str, _Served]]:
    """The adapter's name; how many times its rank all factors have, 1 or 2; and its layers by their names in the
    (unwrapped) model."""
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
    served, times = {}, 1
    for key, layer in layers.items():
        start, of_base = layer.start_of(name), layer.base.start if base == "residual" else None
        ratio = 1.0 if of_base is None else of_base.origin.scaling / layer.scaling[name]
        is_own = of_base is start and ratio == 1
        keeps_start, of_base = is_own or not start.b0.any(), None if is_own else of_base
        served[key] = _Served(layer, keeps_start, of_base, ratio)
        rank = start.origin.r * (1 if keeps_start else 2) + (0 if of_base is None else of_base.origin.r)
        limit = 2 * layer.r[name]
        if of_base is not None and rank > limit:
            raise ValueError(
                f'base: got "residual", but that of layer {key} lacks another start than that of adapter {name!r}, of '
                f"rank {of_base.origin.r}; both together have rank {rank}, and at most {limit} is possible: take "
                'base="original", or give the adapter LoRA\'s start and that rank'
            )
        times = 2 if rank > layer.r[name] else times
    return name, times, served


def _whole(model: PissaModel, adapter_name: str) -> dict[str, Tensor]:
    """The model's state dict without what is sharded and none of the adapter's. What is the adapter's is gathered."""
    found = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not is_sharded(value):
            found[name] = value
        elif f".{adapter_name}" in name or name.endswith(".bias"):
            if is_partitioned(value):
                raise ValueError(
                    f"{name} is partitioned by DeepSpeed. Call this on all ranks inside `with "
                    "deepspeed.zero.GatheredParameters(list(model.parameters())):`"
                )
            found[name] = whole_tensor(value)
    return found
