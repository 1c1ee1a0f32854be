"""What can be adapted, each module by its kind of PissaLayer, and what cannot, refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from pissa.bases import CONVOLUTIONS, is_linear, is_offloaded
from pissa.bitsandbytes import Nf4Base, check_int8, from_bitsandbytes, is_bitsandbytes
from pissa.config import PissaConfig
from pissa.convolution import PissaConv1d, PissaConv2d, PissaConv3d
from pissa.distributed import is_partitioned, is_sharded
from pissa.embedding import PissaEmbedding
from pissa.inject import pissa_layers
from pissa.layer import PissaLayer
from pissa.linear import PissaLinear
from pissa.nf4 import HoldsNf4

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layer_factory(model: nn.Module) -> Callable[..., PissaLayer]:
    """`pissa_layer` for the layers of `model`."""
    dtypes = (
        parameter.dtype
        for name, module in model.named_modules()
        if not isinstance(module, HoldsNf4) and ".lora_" not in name
        for parameter in module.parameters(recurse=False)
        if type(parameter) is nn.Parameter and parameter.is_floating_point()
    )
    return partial(pissa_layer, model_dtype=next(dtypes, torch.get_default_dtype()))


def pissa_layer(
    target: nn.Module, adapter_name: str, config: PissaConfig, *, model_dtype: torch.dtype, **kwargs: Any
) -> PissaLayer:
    """The PissaLayer for `target`, a layer of a model that computes in `model_dtype`.

    Raises:
        TypeError, ValueError: naming the layer, why it cannot be adapted, and what to do instead.
    """
    name = kwargs["target_name"]
    if kwargs.get("parameter_name") is not None:
        raise TypeError(
            f"{name} is a parameter of {type(target).__name__}; PiSSA adapts layers and fused experts: name them in "
            "target_modules"
        )
    base, kind = _base_and_kind(target, name)
    _check_weight(base, name)
    if config.use_dora and kind is not PissaLinear:
        raise TypeError(f"{name} is a {type(target).__name__}, and use_dora is for linear layers; {leave_out(name)}")
    layer = kind(target, adapter_name, config, model_dtype=model_dtype, **kwargs)
    layer.base_layer = base  # which PEFT would warn of, where it is not the target, as of a kind that it does not know
    return layer


_KINDS: tuple[tuple[type[nn.Module], type[PissaLayer]], ...] = (
    (nn.Linear, PissaLinear),
    (Conv1D, PissaLinear),
    (nn.Embedding, PissaEmbedding),
    (nn.Conv1d, PissaConv1d),
    (nn.Conv2d, PissaConv2d),
    (nn.Conv3d, PissaConv3d),
)


def _base_and_kind(target: nn.Module, name: str) -> tuple[nn.Module, type[PissaLayer]]:
    try:
        if is_bitsandbytes(target, "Linear4bit"):
            return from_bitsandbytes(target), PissaLinear
        if is_bitsandbytes(target, "Linear8bitLt"):
            check_int8(target)
            return target, PissaLinear
    except TypeError as error:
        raise TypeError(f"{name} is a {type(target).__name__} of bitsandbytes, but {error}") from None
    for base, kind in _KINDS:
        # A subclass may compute anything; those of embeddings multiply by a scale.
        if (
            type(target) is base
            or (base is nn.Linear and is_linear(target))
            or (base is nn.Embedding and isinstance(target, base) and hasattr(target, "embed_scale"))
        ):
            _check_options(target, name)
            return target, kind
    found = f"{type(target).__module__}.{type(target).__qualname__}"
    if isinstance(target, BaseTunerLayer):
        raise TypeError(f"{name} already carries an adapter of another kind ({found}); unload it first")
    raise TypeError(f"{name} is a {found}; PiSSA adapts {_ADAPTED}; {leave_out(name)}")


_ADAPTED = "nn.Linear, Conv1D, nn.Embedding, nn.Conv1d to 3d, bitsandbytes' layers and transformers' fused experts"


def _check_options(target: nn.Module, name: str) -> None:
    if isinstance(target, CONVOLUTIONS) and target.groups > 1:
        raise TypeError(
            f"{name} is a {type(target).__name__} with groups={target.groups}, whose weight is not one matrix; "
            f"{leave_out(name)}"
        )
    if isinstance(target, nn.Embedding) and target.max_norm is not None:
        raise TypeError(
            f"{name} is an Embedding with max_norm={target.max_norm}, which changes its own weight; {leave_out(name)}"
        )


def _check_weight(base: nn.Module, name: str) -> None:
    weight: Any = base.weight
    if is_partitioned(weight):
        raise TypeError(
            f"the weight of {name} is partitioned by DeepSpeed ZeRO-3 (its shape is {list(weight.ds_shape)}) and holds "
            "no values here: wrap the model inside `with deepspeed.zero.GatheredParameters(model.parameters()):`, or "
            "load it without zero.Init and let deepspeed.initialize partition it after it is wrapped"
        )
    if is_sharded(weight):
        raise TypeError(
            f"the weight of {name} is a DTensor, sharded by fully_shard or a tensor-parallel plan, and PiSSA "
            "decomposes whole weights: wrap the model first and shard it then, fully_shard(pissa.wrap(model, ...))"
        )
    if weight.is_meta and not is_offloaded(base):
        raise ValueError(
            f"the weight of {name} is on the meta device and holds no values: load or materialise it first (a model "
            "that accelerate offloads, device_map=..., is fetched layer by layer)"
        )
    if isinstance(base, Nf4Base) or is_bitsandbytes(base, "Linear8bitLt"):
        return
    if type(weight) is not nn.Parameter or weight.dtype not in _DTYPES:
        raise TypeError(
            f"the weight of {name} is a {type(weight).__name__} of {weight.dtype}, but PiSSA decomposes "
            "plain float32, bfloat16 and float16 weights: load the model in one of these "
            '(quant="nf4" then stores it in 4 bits)'
        )


def check_parents(model: nn.Module, adapter_name: str) -> None:
    """Raises TypeError, naming the layer, where its parent would compute without it and so without its adapter."""
    for name in pissa_layers(model, adapter_name):
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            raise TypeError(
                f"{name} is in a {type(parent).__name__}, which in evaluation computes from the weights of its layers "
                "and would leave the adapter out: call torch.backends.mha.set_fastpath_enabled(False) first, or "
                f"{leave_out(name)}"
            )


def leave_out(name: str) -> str:
    """Advice for messages: how to leave the layer out."""
    return f"leave it out of target_modules or add {name.rpartition('.')[2]!r} to exclude_modules"
