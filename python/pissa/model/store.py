"""Replaces the bases of a model by residuals, layer by layer. Each dense weight is freed as soon as its residual
exists, and so is the file that it may be a view of."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from pissa.base.stored import residuals_of
from pissa.base.weights import is_offloaded
from pissa.config import PissaConfig
from pissa.distributed import agree, failing_together
from pissa.model.decompose import Replacement, groups, share_fingerprints

_PARTLY_STORED = (
    "pissa was replacing the model's dense weights by residuals, and freed each when it was replaced: some are gone, "
    "others are still there, and the adapter is incomplete. Load the model again, and wrap that [P030]"
)


def store(
    model: nn.Module,
    adapter_name: str,
    config: PissaConfig,
    replacements: dict[str, Replacement],
) -> None:
    """Completes in the (unwrapped) model the work that `decompose` has prepared, and empties `replacements`. If the
    dense weights were views of a file, or left in it, the model's other tensors get their own memory, so that nothing
    keeps the file mapped. Until then its pages may stay in memory, but the system can reclaim them.

    If DeepSpeed has partitioned a weight, it is gathered, and its residual is partitioned in its place.

    With several processes, all of them must call this function, outside of `distributed.failing_together`. It has such
    a block of its own, and an error that passed through two blocks would be reported twice, the second time to nobody.

    Raises:
        BaseException: only for reasons other than the weights: memory is short, the user interrupts, another rank
            fails. The model is then partly stored. A note on the error says so, but Python 3.10 does not print it.
    """
    if not replacements:
        return
    layers = {name: replacement.layer for name, replacement in replacements.items()}
    are_views = any(is_offloaded(layer.base.module) or _is_view(layer.base.parameter) for layer in layers.values())
    try:
        with failing_together():
            for group in groups(layers, threads=1):
                agree()  # all processes gather a sharded weight
                residuals: list[Any] = [replacements[name].codes for name in group]
                if None in residuals:
                    weights = [layer.base.matrix() for layer in group.values()]
                    starts = [replacements[name].base_start for name in group]
                    residuals = residuals_of(weights, starts, config.form, list(group))
                    del weights
                for (name, layer), residual in zip(group.items(), residuals, strict=True):
                    replacement = replacements.pop(name)
                    layer.store_base(residual, replacement.base_start, config)
                    layer.start_from(adapter_name, replacement.start)
            if are_views:
                own_memory(model)
            share_fingerprints(layers, lambda layer: layer.residual_fingerprint)
    except BaseException as error:
        # Does what add_note does, which Python 3.10 does not have.
        vars(error)["__notes__"] = [*getattr(error, "__notes__", ()), _PARTLY_STORED]
        raise


def _is_view(tensor: Tensor) -> bool:
    """Whether the tensor keeps more memory than it fills, or memory that torch has not allocated. A parameter that
    safetensors or torch has read is such a view: the whole file stays mapped as long as one of its tensors exists."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        return False
    storage = tensor.untyped_storage()
    return not storage.resizable() or storage.nbytes() > tensor.numel() * tensor.element_size()


@torch.no_grad()
def own_memory(model: nn.Module) -> None:
    """Gives parameters and buffers that are views their own memory. They stay the same objects, and those that are the
    same view still share it. (Of views that only overlap, each gets its own, as when torch moves a model.)"""
    places: dict[tuple[object, ...], list[Tensor]] = defaultdict(list)
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if _is_view(tensor) and tensor.numel():
            places[tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()].append(tensor)
    for tensors in places.values():
        memory = tensors[0].detach().clone()
        for tensor in tensors:
            tensor.data = memory
