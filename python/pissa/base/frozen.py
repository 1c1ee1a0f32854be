"""Modules whose tensors no cast changes: buffers that keep their dtype, and the codes of a quantised weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pissa import ops


class KeepsDtype(nn.Module):
    """A module whose buffers follow it to another device but never to another dtype.

    Start factors and quantisation scales define the base function; `model.half()` must not round them.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class HoldsCodes(KeepsDtype):
    """A module whose parameter `weight` holds the packed codes of a matrix, frozen. The scales are buffers.

    `quant_storage` is the dtype of `weight`, as in bitsandbytes: uint8, or a floating dtype. An element of a floating
    dtype is several bytes of codes; zeros fill up the last one. Such an element means nothing and may be NaN: it is
    moved, never computed with, and keeps its dtype and bits whatever the module is cast to.
    """

    weight: nn.Parameter
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None

    def hold(self, matrix: ops.QuantizedWeight, quant_storage: torch.dtype) -> None:
        """Takes the codes and scales of `matrix` as they are."""
        self.format, self.matrix_shape, self.blocksize = matrix.format, matrix.shape, matrix.blocksize
        self.quant_storage, self._bytes = quant_storage, len(matrix.codes)
        missing = -len(matrix.codes) % quant_storage.itemsize
        codes = functional.pad(matrix.codes, (0, missing)) if missing else matrix.codes
        self.weight = nn.Parameter(codes.view(quant_storage), requires_grad=False)
        self.register_buffer("absmax", matrix.absmax)
        self.register_buffer("nested_absmax", matrix.nested_absmax)
        self.register_buffer("offset", matrix.offset)

    @property
    def quantized(self) -> ops.QuantizedWeight:
        """The matrix [out, in], as pissa.ops takes it. Raises TypeError if something has cast the codes, which destroys
        them."""
        codes: Tensor = self.weight
        if codes.dtype != self.quant_storage:
            raise TypeError(
                f"Codes stored as {self.quant_storage} were cast to {codes.dtype}: FSDP's mixed precision does so "
                'where its param_dtype is another. Give PissaConfig quant_storage of that dtype, or "uint8"'
            )
        if self.quant_storage != torch.uint8:
            codes = codes.view(torch.uint8)[: self._bytes]
        return ops.QuantizedWeight(
            codes, self.absmax, self.nested_absmax, self.offset, self.format, self.matrix_shape, self.blocksize
        )

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantised too."""
        return self.nested_absmax is not None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if tensor is self.weight and new.dtype != tensor.dtype else new

        return super()._apply(moved, recurse)
