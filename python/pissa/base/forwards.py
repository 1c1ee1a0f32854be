"""Forward passes of a model's own modules that faster ones replace, until the model is unloaded."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

_MARK = "_fused_"
"""What the names of attributes begin with that `restore_forwards` removes."""
_FORMER = f"{_MARK}former"


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Makes a module compute `forward(module, ...)`."""
    vars(module).setdefault(_FORMER, vars(module).get("forward"))
    module.forward = MethodType(forward, module)


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
