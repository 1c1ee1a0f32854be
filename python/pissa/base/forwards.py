"""Forward passes of a model's own modules that faster ones replace, until the model is unloaded."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

_MARK = "_fused_"
"""What the names of attributes begin with that `restore_forwards` removes."""
_FORMER, _PART = f"{_MARK}former", f"{_MARK}part"


def replace_forward(module: nn.Module, forward: Callable[..., Any], part: str) -> None:
    """Makes a module compute `forward(module, ...)`. `part` is what `replaced_parts` calls modules like it."""
    vars(module).setdefault(_FORMER, vars(module).get("forward"))
    vars(module)[_PART] = part
    module.forward = MethodType(forward, module)


def replaced_parts(model: nn.Module) -> set[str]:
    """The parts of a model whose forward passes `replace_forward` has replaced."""
    return {vars(module)[_PART] for module in model.modules() if _PART in vars(module)}


def computes_steps(module: nn.Module) -> bool:
    """Whether faster forward passes are used now: in training mode. In evaluation mode, and when torch.compile traces
    it, a module computes its own, bit for bit."""
    return module.training and not torch.compiler.is_compiling()


def restore_forwards(model: nn.Module) -> None:
    """Puts the forward passes back that `replace_forward` has replaced."""
    for module in model.modules():
        attributes: dict[str, Any] = vars(module)
        if _FORMER in attributes:
            attributes.pop("forward", None)  # a merged layer, which is a copy, has none
            if attributes[_FORMER] is not None:
                attributes["forward"] = attributes[_FORMER]
        for name in [name for name in attributes if name.startswith(_MARK)]:
            del attributes[name]
