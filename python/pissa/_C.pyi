"""Compiled core of pissa. Import torch first; use pissa and pissa.ops instead of this module."""

from typing import Any

def build_info() -> dict[str, Any]:
    """Version, compiler, oldest torch supported, instruction set in use and the available ones (best last), CUDA."""
