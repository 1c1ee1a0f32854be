"""Modules that hold NF4 codes (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pissa import ops
from pissa.base.keeps_dtype import KeepsDtype


class HoldsNf4(KeepsDtype):
    """A module whose `weight` holds the packed codes of a matrix, frozen: two elements a byte, high nibble first. The
    scales are buffers.

    `quant_storage` is the dtype of `weight`, as in bitsandbytes: uint8, or a floating dtype whose elements are several
    bytes of codes each, the last one filled up with zeros. Such elements mean nothing, and may be NaN: they are moved,
    never computed with, and keep dtype and bits whatever the module is cast to.
    """

    weight: nn.Parameter
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None

    def hold(self, matrix: ops.QuantizedWeight, quant_storage: torch.dtype) -> None:
        """Takes the codes and scales of `matrix` as they are."""
        self.matrix_shape, self.blocksize, self.quant_storage = matrix.shape, matrix.blocksize, quant_storage
        missing = -len(matrix.codes) % quant_storage.itemsize
        codes = functional.pad(matrix.codes, (0, missing)) if missing else matrix.codes
        self.weight = nn.Parameter(codes.view(quant_storage), requires_grad=False)
        self.register_buffer("absmax", matrix.absmax)
        self.register_buffer("nested_absmax", matrix.nested_absmax)
        self.register_buffer("offset", matrix.offset)

    @property
    def nf4(self) -> ops.QuantizedWeight:
        """The matrix [out, in], as pissa.ops takes it.

        Raises:
            TypeError: something has cast the codes, which destroys them.
        """
        codes: Tensor = self.weight
        if codes.dtype != self.quant_storage:
            raise TypeError(
                f"NF4 codes stored as {self.quant_storage} were cast to {codes.dtype}: FSDP's mixed precision does so "
                'where its param_dtype is another. Give PissaConfig quant_storage of that dtype, or "uint8"'
            )
        if self.quant_storage != torch.uint8:
            rows, columns = self.matrix_shape
            codes = codes.view(torch.uint8)[: (rows * columns + 1) // 2]
        return ops.QuantizedWeight(
            codes, self.absmax, self.nested_absmax, self.offset, "nf4", self.matrix_shape, self.blocksize
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if tensor is self.weight and new.dtype != tensor.dtype else new

        return super()._apply(moved, recurse)

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantised too."""
        return self.nested_absmax is not None
