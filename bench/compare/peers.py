"""The peers: bitsandbytes' 4-bit layer, and PEFT's LoRA on it and on dense models, with the same bytes as our layers.

They are imported only where they are used, so that the rest can be measured on a machine without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pissa import ops

if TYPE_CHECKING:
    import bitsandbytes as bnb
    from peft.tuners.lora import LoraLayer


def bnb_linear(weight: ops.QuantizedWeight, dtype: torch.dtype = torch.bfloat16) -> bnb.nn.Linear4bit:
    """bitsandbytes' layer over a copy of the same codes and nested scales, computing in `dtype`.

    It must stay in training mode if gradients matter. One forward pass in eval mode repacks the weight for its AVX-512
    kernel, which has no gradient; later calls in training mode then use that kernel too, without a warning.
    """
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type

    rows, cols = weight.shape
    layer = bnb.nn.Linear4bit(
        cols, rows, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4", device="meta"
    )
    nested = QuantState(
        absmax=weight.nested_absmax.clone(),
        code=create_dynamic_map().to(weight.device),
        blocksize=256,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=weight.absmax.clone(),
        shape=torch.Size(weight.shape),
        code=get_4bit_type("nf4", device=weight.device),
        blocksize=weight.blocksize,
        quant_type="nf4",
        dtype=dtype,
        offset=weight.offset.clone(),
        state2=nested,
    )
    layer.weight = bnb.nn.Params4bit(
        weight.codes.clone().view(-1, 1),
        requires_grad=False,
        quant_state=state,
        blocksize=weight.blocksize,
        compress_statistics=True,
        quant_type="nf4",
        bnb_quantized=True,
        module=layer,
    )
    return layer


def is_repacked(layer: bnb.nn.Linear4bit) -> bool:
    """Whether the weight is in the layout of the kernel for inference."""
    return bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False))


def lora_layer(base: nn.Module, a: Tensor, b: Tensor, dtype: torch.dtype) -> LoraLayer:
    """PEFT's LoRA layer on `base`, in training mode, scaling 1, with factors A [r, in] and B [out, r] in `dtype`."""
    holder = nn.Sequential()
    holder.add_module("layer", base)
    return _with_lora(holder, {"layer": (a, b)}, dtype)[0]


def lora_on_nf4(
    model: nn.Module, layers: Mapping[str, tuple[ops.QuantizedWeight, Tensor, Tensor]], dtype: torch.dtype
) -> nn.Module:
    """A model whose named layers become bitsandbytes' 4-bit layers, computing in the model's dtype, under PEFT's LoRA
    with the given A and B."""
    computed = next(model.parameters()).dtype
    for name, (weight, _, _) in layers.items():
        model.set_submodule(name, bnb_linear(weight, computed))
    _with_lora(model, {name: (a, b) for name, (_, a, b) in layers.items()}, dtype)
    return model.train()


def _with_lora(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[LoraLayer]:
    """Puts LoRA on the named layers, in place. Returns the layers; PEFT's wrapper around the model is not needed."""
    from peft import LoraConfig, get_peft_model

    model.is_loaded_in_4bit = True  # or PEFT does not choose its layer for bitsandbytes
    (r,) = {a.shape[0] for a, _ in factors.values()}
    get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules=list(factors)))
    layers = [model.get_submodule(name) for name in factors]
    for layer, (a, b) in zip(layers, factors.values(), strict=True):
        for parameter, value in ((layer.lora_A, a), (layer.lora_B, b)):
            parameter["default"].weight = nn.Parameter(value.to(dtype, copy=True))
        layer.train()
    return layers


def lora_on_dense(model: nn.Module, r: int, dtype: torch.dtype, init: bool | str = True) -> nn.Module:
    """PEFT's LoRA on all linear layers, adapters in `dtype`. B starts at zero, or as `init` (PEFT's name) says."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=r, target_modules="all-linear", init_lora_weights=init, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return wrapped.train()


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers that carry LoRA, by their name in the model that was wrapped."""
    from peft.tuners.lora import LoraLayer

    inner = model.base_model.model
    return {name: module for name, module in inner.named_modules() if isinstance(module, LoraLayer)}
