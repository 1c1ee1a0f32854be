"""Several processes (torch.distributed): each computes a share of what all of them need, and all succeed or fail
together.

Nothing here communicates if torch.distributed is not initialised, or has one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor


class RankError(RuntimeError):
    """Another rank has failed in a step that all take together. The message names the rank and its error."""


def world_size() -> int:
    """Number of processes that wrap the model together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process among them."""
    return dist.get_rank() if world_size() > 1 else 0


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process may hold only a part of `tensor`: a DTensor, or a parameter partitioned by DeepSpeed."""
    return type(tensor).__name__ == "DTensor" or is_partitioned(tensor)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether `tensor` is a parameter that DeepSpeed's ZeRO-3 has partitioned: empty until it is gathered."""
    return hasattr(tensor, "ds_id") and tensor.numel() == 0


def check_whole(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, naming the first tensor of which this process holds only a part."""
    if sharded := [name for name, value in tensors.items() if is_sharded(value)]:
        raise ValueError(
            f"the model is sharded: this process holds a part of {sharded[0]} only. Gather it on all ranks by "
            "accelerator.get_state_dict(model), or torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True, cpu_offload=True)), and pass it as state_dict, with "
            "is_main_process"
        )


def gathered(tensor: Tensor) -> Tensor:
    """The whole of `tensor`, which may be a DTensor: then every process has to call this."""
    return cast(Any, tensor).full_tensor() if type(tensor).__name__ == "DTensor" else tensor


def sharded_as(tensor: Tensor, values: Tensor) -> Tensor:
    """`values`, which every process holds whole; as a DTensor if `tensor` is one."""
    if not is_sharded(tensor):
        return values
    from torch.distributed.tensor import distribute_tensor

    like: Any = tensor
    return distribute_tensor(values.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def failing_together() -> Iterator[None]:
    """Makes an error on one rank, inside the block, an error on all ranks. They would otherwise wait for that rank.

    All ranks have to enter the block, and call `agree` and `broadcast` in the same order in it. The failing rank raises
    its own error. A block inside another would tell the same error twice, and wait for ranks that have gone.

    Raises:
        RankError: on the other ranks.
    """
    try:
        yield
    except RankError:
        raise  # every rank knows of it already
    except Exception as error:
        _gather(None, f"{type(error).__name__}: {error}")
        raise
    else:
        agree()


def agree(value: object = None) -> list[Any]:
    """Every rank's `value`, in the order of the ranks.

    Raises:
        RankError: a rank failed before it came here.
    """
    values, errors = zip(*_gather(value, None), strict=True)
    for other, error in enumerate(errors):
        if error is not None:
            raise RankError(f"rank {other} failed, so this one stops too. The error there: {error}")
    return list(values)


def _gather(value: object, error: str | None) -> list[tuple[Any, str | None]]:
    found: list[Any] = [(value, error)] * world_size()
    if len(found) > 1:
        dist.all_gather_object(found, (value, error))
    return found


def owners(sizes: Mapping[str, int]) -> dict[str, int]:
    """The rank that works on each item. The largest are given out first, each to the rank with least to do so far."""
    loads, found = [0] * world_size(), {}
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        found[name] = loads.index(min(loads))
        loads[found[name]] += sizes[name]
    return found


def broadcast(tensor: Tensor, source: int) -> Tensor:
    """The `tensor` of rank `source`. On other ranks `tensor` gives shape, dtype and device, and may be overwritten."""
    if world_size() == 1:
        return tensor
    # "cpu:gloo,cuda:nccl": each kind of device with the backend that sends its tensors. NCCL sends only a GPU's.
    devices = [entry.split(":")[0] for entry in dist.get_backend_config().split(",")]
    carried = tensor.contiguous()
    if tensor.device.type not in devices:
        carried = carried.to(devices[0])
    dist.broadcast(carried, source)
    return carried.to(tensor.device)
