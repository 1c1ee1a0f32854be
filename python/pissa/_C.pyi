"""Compiled core of pissa. Import torch first; use pissa and pissa.ops instead of this module."""

from typing import Any

def build_info() -> dict[str, Any]:
    """Version, compiler, oldest torch supported, instruction set in use, whether it multiplies bytes, the available
    ones (fastest last), why not the faster ones, CUDA."""

def isa_failure() -> str:
    """The self-test of an instruction set that failed and what follows from it, or an empty string."""

def formats() -> dict[str, dict[str, Any]]:
    """The quantised formats by name: bits of a code, blocksizes (none: a block is a row), usual_blocksize, what its
    scales may be (nested: also float32), the bytes of a block with its scales within (others: 0), and the level of
    each code, which its scale multiplies."""

def limits() -> dict[str, Any]:
    """The levels of nested scales (dynamic_map), rows of x up to which factors are not summed (few_tokens), scales
    that are quantised together (nested_blocksize), reads of a weight in a step of the SVD (passes_per_step), and
    scores of a token (scores)."""
