"""Loads the compiled core. torch first: the library finds libtorch_cpu.so because torch has already loaded it."""

import torch  # noqa: F401

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"pissa's compiled core could not be loaded: {error}. It is built by `pip install .` from a clone or comes "
        "with a wheel for this Python; a source folder alone is not enough. torch must be 2.10 or newer."
    ) from error

__all__ = ["_C"]
