"""Where the tests of the ops and of models compute: `pytest --device cuda`; on the CPU unless asked; with
`--device cuda-stand-in` on the stand-in of cuda_stand_in.py, which needs no GPU.

Tests make their tensors on the CPU, so that they are the same ones everywhere, `put` them on the device, and `fetch`
what comes back to compare it with float64 on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

STAND_IN = "cuda-stand-in"
"""For `select`: tensors that say they are on cuda:0 and compute on the CPU."""

current = torch.device("cpu")  # conftest.py sets it before test modules are imported


def on_cpu() -> bool:
    return current.type == "cpu"


def select(name: str) -> None:
    """Chooses the device, or says at once why it cannot be."""
    global current
    if name == STAND_IN:
        current = torch.device("cuda:0")
        return
    device = torch.device(name)
    if device.type == "cuda":
        from pissa.ops import _load

        if not torch.cuda.is_available():
            raise RuntimeError(f"--device {name}: torch finds no GPU here")
        if _load.cuda_problem is not None:
            raise RuntimeError(f"--device {name}: {_load.cuda_problem}")
        # Attention whose backward has the same bits twice, as the tests of models expect of what is around us.
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    elif device.type != "cpu":
        raise RuntimeError(f"--device {name}: allowed are cpu, cuda and {STAND_IN}")
    current = device


def put(value: Any) -> Any:
    """A tensor or module of the CPU on the device; those in tuples, lists and dictionaries too. Anything else, and a
    tensor that is elsewhere already, is as it was. A leaf stays a leaf: it is detached and asks for a gradient anew."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or on_cpu():
            return value
        moved = value.detach().to(current)
        return moved.requires_grad_() if value.requires_grad else moved
    if isinstance(value, nn.Module):
        return value.to(current)
    return _each(value, put)


def fetch(value: Any) -> Any:
    """The same, back on the CPU."""
    if isinstance(value, Tensor):
        return value if value.device.type == "cpu" else value.detach().cpu()
    return _each(value, fetch)


def _each(value: Any, function: Any) -> Any:
    if isinstance(value, dict):
        return {key: function(item) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [function(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return [function(item) for item in value] if isinstance(value, list) else value
