"""A tensor that other code sees and seldom reads: the weight of a base that keeps codes or a residual, of which most
code only asks for the dtype, as T5 does twice in each feed-forward; and logits, of which a training needs the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# What answers without the values.
_ATTRIBUTES = ("device", "dtype", "grad_fn", "is_cuda", "is_meta", "layout", "ndim", "requires_grad", "shape")
_KNOWN: set[Any] = {getattr(Tensor, name).__get__ for name in _ATTRIBUTES}
_KNOWN |= {Tensor.dim, Tensor.element_size, Tensor.is_floating_point, Tensor.numel, Tensor.size}


class LazyTensor(Tensor):
    """A tensor in `dtype` that is computed, by `compute`, whenever a function of torch reads its values."""

    compute: Callable[[], Tensor]

    @staticmethod
    def of(shape: Sequence[int], dtype: torch.dtype, device: torch.device, compute: Callable[[], Tensor]) -> Tensor:
        """Such a tensor, or under torch.compile the computed one."""
        if torch.compiler.is_compiling():
            return compute().to(dtype)
        # One element in memory. It is NaN, so that code which bypasses torch's functions gets no plausible number.
        lazy = torch.full((), math.nan, dtype=dtype, device=device).expand(shape).as_subclass(LazyTensor)
        lazy.compute = compute
        return lazy

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Collection[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _KNOWN:
                return func(*args, **(kwargs or {}))
            args, kwargs = tree_map_only(LazyTensor, _values, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def _values(lazy: LazyTensor) -> Tensor:
    return lazy.compute().to(lazy.dtype)
