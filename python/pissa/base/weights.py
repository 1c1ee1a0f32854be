"""The modules that an adapter changes: the weight of each as the matrix [out, in] that PiSSA decomposes, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pissa import ops
from pissa.base.bitsandbytes import Nf4Base, copy_without_hooks, dequantised_int8, is_bitsandbytes
from pissa.base.stored import StoredLinear
from pissa.distributed import is_sharded

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _View(NamedTuple):
    """How a weight is a matrix [out, in], and how such a matrix is a weight of the given shape."""

    matrix: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor, torch.Size], Tensor]


_AS_IT_IS = _View(lambda weight: weight, lambda matrix, shape: matrix)
_TRANSPOSED = _View(lambda weight: weight.mT, lambda matrix, shape: matrix.mT)
_FLATTENED = _View(lambda weight: weight.flatten(1), lambda matrix, shape: matrix.reshape(shape))


def _view(base: nn.Module) -> _View:
    kind = base.kind if isinstance(base, StoredLinear) else type(base)
    if issubclass(kind, (Conv1D, nn.Embedding)):  # [in, out]; an embedding is a linear layer of one-hot vectors
        return _TRANSPOSED
    return _FLATTENED if isinstance(base, CONVOLUTIONS) else _AS_IT_IS


_FALCON_LINEAR = "transformers.models.falcon.modeling_falcon.FalconLinear"


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is an nn.Linear or, of its subclasses, which may compute anything, one that computes the same:
    Falcon's, where the bias is added in a step of its own."""
    kind = type(module)
    return kind is nn.Linear or f"{kind.__module__}.{kind.__name__}" == _FALCON_LINEAR


@contextmanager
def in_memory(base: nn.Module) -> Iterator[None]:
    """Fetches, for the block, the weights of a module that accelerate has offloaded to memory or disk. Tensors that
    the block keeps stay valid."""
    with align_module_device(base):
        yield


def is_offloaded(base: nn.Module) -> bool:
    """Whether accelerate fetches the module's weights when it is called; until then they are on the meta device."""
    return bool(has_offloaded_params(base))


def execution_device(base: nn.Module) -> torch.device:
    """Where the module computes: where its weights are, or where accelerate fetches them to."""
    if is_offloaded(base):
        return torch.device(cast(Any, base)._hf_hook.execution_device)
    return cast(Tensor, base.weight).device


def weight_matrix(base: nn.Module) -> Tensor:
    """The weight of `base` as a matrix [out, in], y = x Wᵀ: its own tensor or a view of it where it is dense, else
    dequantised, in float32."""
    if isinstance(base, (StoredLinear, Nf4Base)):
        return base.dense()
    with in_memory(base):
        if is_bitsandbytes(base, "Linear8bitLt"):
            return dequantised_int8(base)
        return _view(base).matrix(cast(Tensor, base.weight))


def as_weight(base: nn.Module, matrix: Tensor) -> Tensor:
    """The matrix [out, in] in the shape that a dense weight has in the place of `base`: the way back from
    `weight_matrix`."""
    return _view(base).weight(matrix, cast(Tensor, base.weight).shape)


def whole(base: nn.Module, gathered: Tensor | None) -> Any:
    """`base`, where its weight is sharded a module like it that holds the whole weight, `gathered`.

    Raises:
        ValueError: nothing is gathered.
    """
    if not is_sharded(cast(Tensor, base.weight)):
        return base
    if gathered is None:
        raise ValueError(
            "a base weight was sharded before its fingerprint was known: call torch.distributed.init_process_group "
            "before pissa.wrap, or give save_pretrained a state_dict that has the frozen weights too"
        )
    return with_weight(base, gathered)


def with_weight(base: nn.Module, weight: Tensor) -> Any:
    """A module like `base` that holds another weight, of the same shape."""
    twin = copy_without_hooks(base)
    twin._parameters = base._parameters | {"weight": nn.Parameter(weight, requires_grad=False)}
    return twin


def base_product(base: nn.Module, x: Tensor) -> Tensor:
    """x Wᵀ [k, out] in float32 for the weight of a linear base and x float32 [k, in], without its bias."""
    if isinstance(base, (StoredLinear, Nf4Base)):
        return base.product(x)
    return ops.linear(x, weight_matrix(base).detach())


def dense_kind(base: nn.Module) -> type[nn.Module]:
    """nn.Linear, another class of linear layers, or Conv1D: what a dense linear module in the place of `base` is."""
    if isinstance(base, StoredLinear):
        return base.kind
    return type(base) if isinstance(base, Conv1D) or is_linear(base) else nn.Linear


def bias_of(base: nn.Module) -> nn.Parameter | None:
    """The bias of `base`, fetched where it is offloaded; None where it has none."""
    with in_memory(base):
        return cast("nn.Parameter | None", getattr(base, "bias", None))


def with_matrix(base: nn.Module, matrix: Tensor) -> nn.Module:
    """A dense module of `base`'s kind in its place: the weight is `matrix` [out, in], frozen; all else, the bias too,
    is the base's own."""
    twin: nn.Module
    if isinstance(base, (StoredLinear, Nf4Base)) or is_bitsandbytes(base, "Linear8bitLt"):
        with torch.device("meta"):
            kind = dense_kind(base)
            twin = kind(*(matrix.shape if kind is Conv1D else matrix.mT.shape))
        shape = torch.Size()
    else:
        twin = copy_without_hooks(base)
        twin._parameters = base._parameters.copy()
        shape = cast(Tensor, base.weight).shape
    weight = _view(twin).weight(matrix, shape).contiguous()
    twin.weight = nn.Parameter(weight, requires_grad=False)
    if "bias" in twin._parameters:
        twin.register_parameter("bias", bias_of(base))
    if is_offloaded(base):  # and there may be no room for more weights where it computes
        hook = cast(Any, base)._hf_hook
        add_hook_to_module(
            twin, AlignDevicesHook(hook.execution_device, offload=True, io_same_device=hook.io_same_device)
        )
    return twin.train(base.training)
