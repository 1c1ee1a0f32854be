"""Compiled core of pissa. Import torch first; use pissa and pissa.ops instead of this module."""

from typing import Any

def build_info() -> dict[str, Any]:
    """Version, compiler, oldest torch supported, instruction set in use and the available ones (best last), CUDA."""

NESTED_BLOCKSIZE: int
PASSES_PER_STEP: int

def formats() -> dict[str, dict[str, Any]]:
    """The quantised formats by name: bits of a code, blocksizes (none: a block is a row), usual_blocksize, and
    whether scales can be quantised too (nested)."""
