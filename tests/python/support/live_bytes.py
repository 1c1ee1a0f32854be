"""The memory of tensors that are alive at once, counted, since tracemalloc does not see it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts, in its block, the bytes of the storages that operations make, as long as they live. What is mapped from a
    file is not made by one."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in given and storage not in self._known:
                    self._known.add(storage)
                    self._grow(storage.nbytes())
                    weakref.finalize(storage, self._grow, -storage.nbytes())
        return out

    def _grow(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)
