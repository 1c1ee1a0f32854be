"""The quantised formats: what is to be known of each, from the core's table (cpp/pissa/core/format.h)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pissa.ops._load import _C

DEFAULT = "nf4"
"""The format that is meant where none is named."""
NESTED_BLOCKSIZE: int = _C.limits()["nested_blocksize"]


@dataclass(frozen=True)
class QuantFormat:
    """A format of codes, with a scale for each block of them.

    Blocks are runs of the flattened weight, of one of `blocksizes`; or, where there are none, rows.
    """

    name: str
    bits: int
    """Of a code."""
    blocksizes: tuple[int, ...]
    usual_blocksize: int
    has_double_quant: bool
    """Whether the scales can be quantised too."""

    def options(self, blocksize: int | None, double_quant: bool | None, columns: int) -> tuple[int, bool]:
        """Elements of a block in a weight with that many columns, and whether scales are quantised: what is asked for,
        where it is not None, else what is usual.

        Raises:
            ValueError: what is asked for does not exist in the format.
        """
        self.check_options(blocksize, double_quant)
        usual = self.usual_blocksize if self.blocksizes else columns
        return (
            usual if blocksize is None else blocksize,
            self.has_double_quant if double_quant is None else double_quant,
        )

    def check_options(self, blocksize: int | None, double_quant: bool | None) -> None:
        """Raises ValueError unless the format has blocks of that size, and scales of that kind."""
        if blocksize is not None and blocksize not in self.blocksizes:
            allowed = ", ".join(map(str, self.blocksizes)) or f"None, for a block of {self.name} is a row"
            raise ValueError(f"blocksize: got {blocksize!r}; allowed: {allowed}")
        if double_quant and not self.has_double_quant:
            raise ValueError(f"double_quant: got {double_quant!r}; allowed: False; scales of {self.name} are float32")

    def tensors(
        self, shape: tuple[int, int], blocksize: int, double_quant: bool
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of the tensors that a weight [out, in] consists of, by their names in `QuantizedWeight`."""
        elements = math.prod(shape)
        blocks = _ceil_div(elements, blocksize)
        parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((_ceil_div(elements * self.bits, 8),), torch.uint8),
            "absmax": ((blocks,), torch.uint8 if double_quant else torch.float32),
        }
        if double_quant:
            parts["nested_absmax"] = ((_ceil_div(blocks, NESTED_BLOCKSIZE),), torch.float32)
            parts["offset"] = ((), torch.float32)
        return parts


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


FORMATS: dict[str, QuantFormat] = {
    name: QuantFormat(name, row["bits"], tuple(row["blocksizes"]), row["usual_blocksize"], row["nested"])
    for name, row in _C.formats().items()
}
"""By name."""
