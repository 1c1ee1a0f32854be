"""Loads the compiled core and, if torch is built for CUDA 13, the CUDA library too.

torch must be imported first: the libraries find libtorch_cpu.so and libtorch_cuda.so because torch has loaded them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from pissa.notices import InstructionSetWarning

try:
    import pissa._C as _C
except ImportError as error:
    raise ImportError(
        f"pissa's compiled core could not be loaded: {error}. It is built by `pip install .` from a clone or comes "
        "with a wheel for this Python; a source folder alone is not enough. torch must be 2.10 or newer. [P001]"
    ) from error

__all__ = ["FORCED", "_C", "cuda_problem", "has_kernels", "routes"]

_CUDA = 13  # the major version of CUDA that the library is built for, which torch must have loaded too
# The CUDA libraries that the library links, their own dependencies first, and the package that contains each.
_CUDA_LIBRARIES = {
    "libnvJitLink.so.13": "nvjitlink",
    "libcublasLt.so.13": "cublas",
    "libcublas.so.13": "cublas",
    "libcusparse.so.12": "cusparse",
    "libcusolver.so.12": "cusolver",
}


def _preload_cuda_libraries() -> None:
    """Loads CUDA's libraries from next to torch. Our library looks for them next to pissa, which may be in another
    folder, and torch itself does not load all of them, because it starts without cuSOLVER. The libraries that need them
    find them by name in the process; their symbols stay private."""
    packages = Path(torch.__file__).parents[1] / "nvidia"
    for name, package in _CUDA_LIBRARIES.items():
        paths = (packages / folder / "lib" / name for folder in (f"cu{_CUDA}", package))
        if path := next(filter(Path.exists, paths), None):
            with contextlib.suppress(OSError):  # the library that needs it reports the error
                ctypes.CDLL(str(path))


def _load_cuda(library: Path) -> str | None:
    """Loads the library. Returns None, or why it cannot be used and what to do about it. This is not an error yet,
    because computing on the CPU does not need the library. CUDA is not initialised."""
    if torch.version.hip is not None:
        return "they are for NVIDIA's GPUs and CPUs"
    if not library.exists():
        return (
            "this build of pissa has no CUDA library: build it with CUDA 13 by "
            "`pip install . --config-settings=cmake.define.PISSA_CUDA=ON` in a clone [P004]"
        )
    cuda = torch.version.cuda
    if cuda is None or int(cuda.split(".")[0]) != _CUDA:
        built = f"torch {torch.__version__} is built {'without CUDA' if cuda is None else f'for CUDA {cuda}'}"
        return f"{built}: install a build of torch for CUDA {_CUDA} (https://pytorch.org/get-started) [P004]"
    load: Callable[[str], None] = torch.ops.load_library
    try:
        try:
            load(str(library))
        except OSError:
            _preload_cuda_libraries()
            load(str(library))
    except OSError as error:
        return (
            f"pissa's CUDA library could not be loaded: {error.__cause__ or error}; CUDA's own libraries "
            "come with `pip install nvidia-cublas nvidia-cusolver`, or with pissa[cuda] [P004]"
        )
    return None


if failure := _C.isa_failure():
    warnings.warn(f"{failure}; please report it with what `pissa env` prints", InstructionSetWarning, stacklevel=2)

# Why our kernels do not compute on CUDA here; None if they do.
cuda_problem: str | None = _load_cuda(Path(_C.__file__).with_name(f"libpissa_cuda{_CUDA}.so"))
# Whether PyTorch's operations compute instead of our kernels (ops/composite.py), which is asked for to report a fault.
FORCED = os.environ.get("PISSA_COMPOSITE") == "1"


def routes() -> str:
    """The ways to compute on the current GPU (cpp/pissa/cuda/routes.h), as its self-test found them, or its error."""
    try:
        closed = torch.ops.pissa.closed_routes(torch.empty(0, device="cuda"))
    except RuntimeError as error:
        return str(error)
    names = "early_launch", "lt", "few_rows", "group"  # in the order of routes.h
    return ", ".join(f"{name}: {'wrong' if closed >> i & 1 else 'good'}" for i, name in enumerate(names))


def has_kernels(device: torch.device) -> bool:
    """Whether our kernels compute on a device. On the meta device, too, they do not."""
    return not FORCED and (device.type == "cpu" or (device.type == "cuda" and cuda_problem is None))
