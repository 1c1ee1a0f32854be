"""Compiled core of pissa. Import torch first; use pissa and pissa.ops instead of this module."""

from typing import Any

import numpy as np
import numpy.typing as npt

def build_info() -> dict[str, Any]:
    """Version, compiler, oldest torch supported, instruction set in use and the available ones (best last), CUDA."""

NESTED_BLOCKSIZE: int
PASSES_PER_STEP: int

def formats() -> dict[str, dict[str, Any]]:
    """The quantised formats by name: bits of a code, blocksizes (none: a block is a row), usual_blocksize, and
    whether scales can be quantised too (nested)."""

def svd_lowrank(
    weight: npt.NDArray[np.float32], r: int, passes: int | None = None, seed: int = 0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Leading r singular triplets (U [out, r], S [r], Vh [r, in]) of a float32 array [out, in].
    passes over it: an even number, or None for as many as the rank needs."""

def nf4_quantize(
    weight: npt.NDArray[np.float32], blocksize: int = 64
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """(codes uint8 [ceil(out * in / 2)], absmax float32 [blocks]) of a float32 array [out, in], bitsandbytes' bytes."""

def nf4_dequantize(
    codes: npt.NDArray[np.uint8], absmax: npt.NDArray[np.float32], rows: int, cols: int, blocksize: int = 64
) -> npt.NDArray[np.float32]:
    """float32 array [rows, cols] from NF4 codes and absmax."""
