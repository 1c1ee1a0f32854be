"""The quantised formats and their properties, from the core's table (cpp/pissa/core/format.h)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pissa.ops._load import _C

DEFAULT = "nf4"
"""The default format."""
NESTED_BLOCKSIZE: int = _C.limits()["nested_blocksize"]


@dataclass(frozen=True)
class QuantFormat:
    """A format of codes, with a scale for each block of them.

    Blocks are runs of the flattened weight, with one of the `blocksizes`, or rows if there are none. The blocks of
    "mxfp4", "nvfp4" and "int4" do not cross rows.
    """

    name: str
    bits: int
    """Bits of a code."""
    blocksizes: tuple[int, ...]
    usual_blocksize: int
    levels: tuple[float, ...]
    """The level of each code, which its block's scale multiplies."""
    scales: str
    """The kind of its scales, one of "float32", "nested" (quantised too, or float32), "e8m0", "e4m3" (one byte each),
    "bfloat16", "tiles" (float32, bfloat16 or E8M0) and "within" (inside the blocks of codes)."""
    block_bytes: int = 0
    """Bytes of a block whose scales are within."""

    @property
    def is_read_only(self) -> bool:
        """Whether weights are read in the format but not quantised to it, as in GGUF's blocks."""
        return self.scales == "within"

    @property
    def has_double_quant(self) -> bool:
        """Whether the scales can be quantised too."""
        return self.scales == "nested"

    def options(self, blocksize: int | None, double_quant: bool | None, columns: int) -> tuple[int, bool]:
        """Returns the elements of a block in a weight with that many columns, and whether scales are quantised: the
        requested values, or the defaults where they are None.

        Raises:
            ValueError: the format does not support the requested values.
        """
        if blocksize is not None and blocksize not in self.blocksizes:
            allowed = ", ".join(map(str, self.blocksizes)) or f"None, because a block of {self.name} is a row"
            raise ValueError(f"blocksize: got {blocksize!r}; allowed: {allowed}")
        if double_quant and not self.has_double_quant:
            raise ValueError(f"double_quant: got {double_quant!r}; allowed for {self.name}: False [P035]")
        if blocksize is None:
            blocksize = self.usual_blocksize if self.blocksizes else columns
        if self.scales in _WITHIN_ROWS and columns % blocksize:
            raise ValueError(f"{self.name}: got a weight of {columns} columns; needed: a multiple of {blocksize}")
        return blocksize, self.has_double_quant if double_quant is None else double_quant

    def tensors(
        self, shape: tuple[int, int], blocksize: int, double_quant: bool
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shapes and dtypes of the tensors of a weight [out, in] that is quantised here, by their names in
        `QuantizedWeight`."""
        elements = math.prod(shape)
        blocks = _ceil_div(elements, blocksize)
        if self.is_read_only:
            return {"codes": ((blocks * self.block_bytes,), torch.uint8), "absmax": ((0,), torch.uint8)}
        parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((_ceil_div(elements * self.bits, 8),), torch.uint8),
            "absmax": ((blocks,), torch.uint8 if double_quant else _SCALE_DTYPES.get(self.scales, torch.float32)),
        }
        if self.scales == "e4m3":
            parts["nested_absmax"] = ((256,), torch.float32)
        if double_quant:
            parts["nested_absmax"] = ((_ceil_div(blocks, NESTED_BLOCKSIZE),), torch.float32)
            parts["offset"] = ((), torch.float32)
        return parts


_SCALE_DTYPES = {"e8m0": torch.uint8, "e4m3": torch.uint8, "bfloat16": torch.bfloat16}
_WITHIN_ROWS = (*_SCALE_DTYPES, "within")


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


READ: dict[str, QuantFormat] = {
    name: QuantFormat(
        name,
        row["bits"],
        tuple(row["blocksizes"]),
        row["usual_blocksize"],
        tuple(row["levels"]),
        row["scales"],
        row["block_bytes"],
    )
    for name, row in _C.formats().items()
}
"""The formats with which ops compute, by name."""

FORMATS = {name: format for name, format in READ.items() if not format.is_read_only}
"""Those to which a weight can be quantised."""
