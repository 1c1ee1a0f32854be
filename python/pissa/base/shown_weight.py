"""The weight that other code sees of a base that keeps codes or a residual. Most of that code only asks for its dtype,
as T5 does twice in each feed-forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# What answers without the values.
_ATTRIBUTES = ("device", "dtype", "is_cuda", "is_meta", "layout", "ndim", "requires_grad", "shape")
_KNOWN: set[Any] = {getattr(Tensor, name).__get__ for name in _ATTRIBUTES}
_KNOWN |= {Tensor.dim, Tensor.element_size, Tensor.is_floating_point, Tensor.numel, Tensor.size}


class ShownWeight(Tensor):
    """A weight in `dtype` that is decoded, by `decode`, whenever a function of torch reads its values."""

    decode: Callable[[], Tensor]

    @staticmethod
    def of(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, decode: Callable[[], Tensor]) -> Tensor:
        """The weight, or under torch.compile the decoded tensor."""
        if torch.compiler.is_compiling():
            return decode().to(dtype)
        # One element in memory. It is NaN, so that code which bypasses torch's functions gets no plausible number.
        shown = torch.full((), math.nan, dtype=dtype, device=device).expand(shape).as_subclass(ShownWeight)
        shown.decode = decode
        return shown

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Collection[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _KNOWN:
                return func(*args, **(kwargs or {}))
            args, kwargs = tree_map_only(ShownWeight, _decode, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def _decode(shown: ShownWeight) -> Tensor:
    return shown.decode().to(shown.dtype)
