"""A device for which pissa has no kernel: "other", in torch's place for private devices. A fallback for all of torch's
operations computes on the CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "other"


def _compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """What an operation returns for tensors here: by the CPU; where it writes to a tensor, that one."""
    given = {id(tensor.held): tensor for tensor in tree_leaves((args, kwargs)) if _is_here(tensor)}

    def here(value: Any) -> Any:
        return torch.device("cpu") if isinstance(value, torch.device) else value.held if _is_here(value) else value

    def there(value: Any) -> Any:
        if not isinstance(value, Tensor) or _is_here(value):
            return value
        if id(value) in given:
            return given[id(value)]
        tensor = torch._C._acc.create_empty_tensor(value.shape, value.dtype)  # contiguous, whatever the value is
        tensor.held = value
        return tensor

    args, kwargs = tree_map(here, (args, kwargs))
    if op is torch.ops.aten.view.default:
        op = torch.ops.aten.reshape.default
    if op is torch.ops.aten._copy_from.default:
        return there(args[1].copy_(args[0])) if id(args[1]) in given else args[1].copy_(args[0])
    return tree_map(there, op(*args, **kwargs))


def _is_here(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


_MOVES = ("aten::_to_copy", "aten::copy_")
"""Operations that move tensors between devices."""

_LIBRARIES: list[torch.library.Library] = []


def register() -> torch.device:
    """Makes the device known to torch, once in a process."""
    if not _LIBRARIES:
        _setup_privateuseone_for_python_backend(NAME)
        _LIBRARIES.extend((torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")))
        _LIBRARIES[0].fallback(_compute, "PrivateUse1")
        for name in torch._C._dispatch_get_all_op_names():  # torch's own kernels for any device know no `held`
            known = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd")
            if name.startswith("aten::") and known and name not in _MOVES:
                namespace, _, overload = name.partition("::")[2].partition(".")
                op = getattr(getattr(torch.ops.aten, namespace), overload or "default")
                _LIBRARIES[1].impl(name, partial(_compute, op), "PrivateUse1")
    return torch.device(NAME)
