"""Tensors that are views of memory which is not theirs alone, such as a mapped file."""

from __future__ import annotations

import itertools
from collections import defaultdict

import torch
from torch import Tensor, nn


def is_view(tensor: Tensor) -> bool:
    """Whether the tensor keeps more memory than it fills, or memory that torch has not allocated. A parameter that
    safetensors or torch have read is such a view: the whole file is mapped as long as one of its tensors is left."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        return False
    storage = tensor.untyped_storage()
    return not storage.resizable() or storage.nbytes() > tensor.numel() * tensor.element_size()


@torch.no_grad()
def own_memory(model: nn.Module) -> None:
    """Gives parameters and buffers that are views memory of their own. They stay the same objects, and those at one
    place have one place afterwards. Views that overlap otherwise stay as they are."""
    places: dict[tuple[int, int, torch.dtype, tuple[int, ...]], list[Tensor]] = defaultdict(list)
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if is_view(tensor) and tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            first = tensor.data_ptr()
            end = first + (last + 1) * tensor.element_size()
            places[first, end, tensor.dtype, tensor.stride()].append(tensor)
    overlapping, reached = set(), None
    for place in sorted(places, key=lambda place: place[:2]):
        if reached is not None and place[0] < reached[1]:
            overlapping |= {place, reached}
        if reached is None or place[1] > reached[1]:
            reached = place
    for place, tensors in places.items():
        if place not in overlapping:
            memory = tensors[0].detach().clone()
            for tensor in tensors:
                tensor.data = memory
