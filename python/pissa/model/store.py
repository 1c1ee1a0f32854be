"""The bases of a model replaced by residuals, layer by layer: each dense weight is let go as soon as its residual is
there, and so is the file that it may be a view of."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from pissa.base.fingerprint import Fingerprints
from pissa.base.stored import residuals_of
from pissa.config import PissaConfig
from pissa.distributed import agree, failing_together
from pissa.model.decompose import Replacement, groups, share_fingerprints

_PARTLY_STORED = (
    "pissa was replacing the model's dense weights by residuals, and freed each when it was replaced: some are gone, "
    "others are still there, and the adapter is incomplete. Load the model again, and wrap that"
)


def store(
    model: nn.Module,
    adapter_name: str,
    config: PissaConfig,
    replacements: dict[str, Replacement],
) -> None:
    """Does in the (unwrapped) model what `decompose` has left to do, and empties `replacements`. If the dense weights
    were views of a file, the model's other tensors get memory of their own, so that nothing keeps the file mapped.
    Until then its pages may stay, which the system can take back.

    A weight that DeepSpeed has partitioned is gathered, and its residual partitioned in its place.

    With several processes all of them have to call this, outside of `distributed.failing_together`: it has a block of
    its own, and an error that went through two would be told twice, the second time to nobody.

    Raises:
        BaseException: only for reasons beside the weights: memory is short, the user interrupts, another rank fails.
            The model is then partly stored; a note on the error says so, which Python 3.10 does not print.
    """
    if not replacements:
        return
    layers = {name: replacement.layer for name, replacement in replacements.items()}
    are_views = any(_is_view(layer.base.parameter) for layer in layers.values())
    try:
        with failing_together():
            for group in groups(layers, threads=1):
                agree()  # a sharded weight is gathered by all
                residuals: list[Any] = [replacements[name].codes for name in group]
                if None in residuals:
                    weights = [layer.base.matrix() for layer in group.values()]
                    starts = [replacements[name].of_base for name in group]
                    residuals = residuals_of(weights, starts, config.form, list(group))
                    del weights
                for (name, layer), residual in zip(group.items(), residuals, strict=True):
                    replacement = replacements.pop(name)
                    layer.store_base(residual, replacement.of_base, config)
                    layer.start_from(adapter_name, replacement.start)
            if are_views:
                own_memory(model)
            share_fingerprints(layers, Fingerprints.of_residual, Fingerprints.learn_residual)
    except BaseException as error:
        # What add_note does, which Python 3.10 does not have.
        vars(error)["__notes__"] = [*getattr(error, "__notes__", ()), _PARTLY_STORED]
        raise


def _is_view(tensor: Tensor) -> bool:
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
        if _is_view(tensor) and tensor.numel():
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
