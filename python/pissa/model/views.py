"""Tensors that are views of more memory than they fill, such as those of a mapped file."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection

import torch
from torch import Tensor, nn


def storages(tensors: Collection[Tensor]) -> set[int]:
    """What `own_memory` knows the memory of these tensors by."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if not tensor.is_meta}


@torch.no_grad()
def own_memory(model: nn.Module, emptied: Collection[int]) -> None:
    """Gives memory of their own to the parameters and buffers that are views of one of these storages, if they leave a
    part of it unused. A parameter that transformers has loaded is a view of its file, which stays mapped as long as one
    of them is left.

    The tensors stay the same objects, and those at one place in a storage have one place afterwards. A storage in which
    tensors overlap otherwise is left as it is.

    Args:
        emptied: `storages` of tensors that the model had.
    """
    found: dict[int, dict[tuple[object, ...], list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if not tensor.is_meta and tensor.numel() and (storage := tensor.untyped_storage().data_ptr()) in emptied:
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            found[storage][place].append(tensor)
    for places in found.values():
        views = [tensors[0] for tensors in places.values()]
        used = sum(view.numel() * view.element_size() for view in views)
        if used < views[0].untyped_storage().nbytes() and not _overlap(views):
            for tensors in places.values():
                memory = tensors[0].detach().clone()
                for tensor in tensors:
                    tensor.data = memory


def _overlap(views: list[Tensor]) -> bool:
    """Whether the first to the last byte of a view has bytes of another."""
    ends = []
    for view in views:
        last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
        ends.append((view.data_ptr(), view.data_ptr() + (last + 1) * view.element_size()))
    return any(end > start for (_, end), (start, _) in itertools.pairwise(sorted(ends)))
