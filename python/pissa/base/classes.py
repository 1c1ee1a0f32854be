"""Determines which base a module is, and which modules can be adapted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pissa import ops
from pissa.base.bitsandbytes import BnbLinear, from_bitsandbytes, is_bitsandbytes, why_unusable
from pissa.base.protocol import Base, unshard
from pissa.base.released_layouts import released_linear
from pissa.base.weights import CodedLinear, Dense, HoldsCodes, OwnBase, WholeCodes, is_offloaded
from pissa.distributed import is_partitioned, is_sharded, whole_tensor


def base_of(module: nn.Module) -> Base:
    """The base for a module: the module itself if it is one of ours."""
    if isinstance(module, OwnBase):
        return module
    return BnbLinear(module) if is_bitsandbytes(module, "Linear4bit", "Linear8bitLt") else Dense(module)


def adopt(target: nn.Module) -> Base | None:
    """The base that replaces a module of a model; None if modules of this kind cannot be adapted. Raises TypeError if
    the kind can be adapted but this module cannot. The error's text follows "layer x is"."""
    what, base = f"a {type(target).__name__}", base_of(target)
    if isinstance(base, BnbLinear):
        if reason := why_unusable(target):
            raise TypeError(f"{what} of bitsandbytes, but {reason}")
        return from_bitsandbytes(target) if is_bitsandbytes(target, "Linear4bit") else base
    if (released := released_linear(target)) is not None:
        return released
    if base.module_class is None or not _computes_as(base.module_class, target):
        return None
    if getattr(target, "groups", 1) != 1:
        raise TypeError(f"{what} with groups={target.groups}, whose weight is not one matrix")
    if getattr(target, "max_norm", None) is not None:
        raise TypeError(f"an Embedding with max_norm={target.max_norm}, which changes its own weight")
    return base


_FALCON_LINEAR = "transformers.models.falcon.modeling_falcon.FalconLinear"


def _computes_as(known: type[nn.Module], module: nn.Module) -> bool:
    """Whether the module computes what `known` does, although a subclass may compute anything. Falcon's linear layers
    do (they add the bias in a separate step), and so do embeddings that scale looked-up rows."""
    own = type(module)
    if known is nn.Linear and f"{own.__module__}.{own.__qualname__}" == _FALCON_LINEAR:
        return True
    return own is known or (known is nn.Embedding and hasattr(module, "embed_scale"))


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes what nn.Linear does."""
    return base_of(module).module_class is nn.Linear and adopt(module) is not None


def frozen_product(module: Any) -> tuple[Tensor | ops.QuantizedWeight, Tensor | None] | None:
    """Weight and bias of a module that only computes a product with them, neither of them trained; None for any other
    module, and for one whose weight is not here."""
    if type(module) is CodedLinear:
        return module.quantized, module.bias
    if not is_linear(module) or not isinstance(base_of(module), Dense):
        return None
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or is_offloaded(module):
        return None
    if any(parameter.requires_grad or is_partitioned(parameter) for parameter in module.parameters()):
        return None
    return whole_tensor(module.weight), None if module.bias is None else whole_tensor(module.bias)


def has_our_codes(module: nn.Module) -> bool:
    """Whether the module is one of ours that holds codes, which no other program reads."""
    return isinstance(module, HoldsCodes)


def has_codes(module: nn.Module) -> bool:
    """Whether the module itself, one of ours or of another library, holds a matrix in codes."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return has_our_codes(module) or any(tensor is not None and _is_in_codes(tensor) for tensor in tensors)


def _is_in_codes(tensor: Tensor) -> bool:
    is_plain = type(tensor) in (Tensor, nn.Parameter) or is_sharded(tensor)  # others decode themselves, as torchao's do
    return tensor.dim() > 1 and (not is_plain or tensor.dtype in _DTYPES_OF_CODES)


_DTYPES_OF_CODES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)


def decoded_module(module: nn.Module, dtype: torch.dtype) -> nn.Module | None:
    """A dense module in `dtype` that computes what a module whose whole weight is codes does; None for any other
    module, and for codes that are not read here."""
    base = _coded_base(module)
    if base is None:
        return None
    return base.dense_module(unshard(base, whole_tensor(base.parameter)).matrix().to(dtype))


def _coded_base(module: nn.Module) -> Base | None:
    if isinstance(module, WholeCodes):
        return module
    try:
        base = adopt(module)
    except (TypeError, ValueError):
        return None
    return base if base is not None and base.is_quantised else None


def computing_parameters(module: nn.Module) -> list[Tensor]:
    """A module's own parameters, except codes, whose dtype means nothing."""
    return [] if isinstance(module, HoldsCodes) else list(module.parameters(recurse=False))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode in the block, except for bitsandbytes' 4-bit layers, and restores all modes after it.
    Nothing in these layers depends on the mode, but in evaluation on a CPU they would repack their codes and return no
    gradient any more."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in modes:
        if is_bitsandbytes(module, "Linear4bit"):
            module.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def never_repack(model: nn.Module) -> None:
    """Keeps the 4-bit layers that bitsandbytes computes from repacking their codes when they are evaluated on a CPU.
    bitsandbytes 0.50.2 does not undo all of it: once a state dict has been taken, as for every save, a repacked layer
    computes with its scales in another order."""
    for module in model.modules():
        if is_bitsandbytes(module, "Linear4bit"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def has_4_bits(model: nn.Module) -> bool:
    """Whether bitsandbytes stores weights of a model in 4 bits."""
    layers = (module for module in model.modules() if is_bitsandbytes(module, "Linear4bit"))
    return any(getattr(layer.weight, "quant_state", None) for layer in layers)
