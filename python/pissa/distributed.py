"""Several processes (torch.distributed): each computes a share of what all of them need, and all succeed or fail
together.

Nothing here communicates if torch.distributed is not initialised or has only one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call


class RankError(RuntimeError):
    """Another rank has failed in a step that all ranks take together. The message names the rank and its error."""


def world_size() -> int:
    """The number of processes that wrap the model together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process among them."""
    return dist.get_rank() if world_size() > 1 else 0


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process may hold only a part of `tensor`: a DTensor, or a parameter partitioned by DeepSpeed."""
    return is_dtensor(tensor) or is_partitioned(tensor)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether `tensor` is sharded by torch: by fully_shard or a tensor-parallel plan."""
    return type(tensor).__name__ == "DTensor"  # so that its module need not be imported


def is_partitioned(tensor: Tensor) -> bool:
    """Whether `tensor` is a parameter that DeepSpeed's ZeRO-3 has partitioned: empty until it is gathered."""
    return hasattr(tensor, "ds_id") and tensor.numel() == 0


def is_of_an_engine(module: nn.Module) -> bool:
    """Whether deepspeed.initialize has taken over a module for ZeRO-3, which leaves small parameters whole."""
    return type(module._parameters).__name__ == "ZeROOrderedDict"


def is_managed(module: nn.Module) -> bool:
    """Whether FSDP holds a module's parameters. FSDP marks such modules for torch.compile."""
    return getattr(module, "_is_fsdp_managed_module", False)


def check_whole(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, naming the first one, if this process holds only a part of a tensor."""
    if sharded := [name for name, value in tensors.items() if is_sharded(value)]:
        raise ValueError(
            f"the model is sharded: this process holds only a part of {sharded[0]}. Gather it on all ranks by "
            "accelerator.get_state_dict(model), or torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True, cpu_offload=True)), and pass it as state_dict, with "
            "is_main_process [P048]"
        )


def shard_as(tensor: Tensor, values: Tensor) -> Tensor:
    """`values`, which every process holds whole, as a DTensor if `tensor` is one."""
    if not is_dtensor(tensor):
        return values
    from torch.distributed.tensor import distribute_tensor

    like: Any = tensor
    return distribute_tensor(values.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def is_data_parallel(tensor: Tensor) -> bool:
    """Whether all processes share a DTensor as in fully_shard: sharded over one dimension of the mesh, and replicated
    over those before it. A module that fully_shard manages computes with the whole tensor. Tensor-parallel plans shard
    over a dimension of another name, or over one more, or replicate over the last."""
    like: Any = tensor
    *others, last = like.placements
    return bool(
        like.device_mesh.size() == world_size()
        and last.is_shard()
        and all(other.is_replicate() for other in others)
        and "tp" not in (like.device_mesh.mesh_dim_names or ())
    )


def whole_device(tensor: Tensor) -> torch.device:
    """The device on which the whole tensor is used in computations. (FSDP may keep the shards on the CPU.)"""
    if not is_dtensor(tensor):
        return tensor.device
    like: Any = tensor
    device_type: str = like.device_mesh.device_type
    return tensor.device if tensor.device.type == device_type else torch.empty(0, device=device_type).device


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor."""
    partitioned: Any = tensor
    return torch.Size(partitioned.ds_shape) if is_partitioned(tensor) else tensor.shape


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor. If it is sharded, all processes must call this together, and each gets a copy."""
    if is_partitioned(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    if not is_dtensor(tensor):
        return tensor
    like: Any = tensor.detach().to(whole_device(tensor))
    full: Tensor = like.full_tensor()
    return full


def call_whole(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a module that FSDP does not manage. If its frozen parameters are sharded, they stay sharded in a forward
    pass, so they are gathered for this call."""
    gathered = {name: whole_tensor(value) for name, value in module.named_parameters() if is_dtensor(value)}
    return functional_call(module, gathered, args, kwargs) if gathered else module(*args, **kwargs)


def partition_as(tensor: Tensor, parameters: Iterable[Tensor]) -> None:
    """Partitions new parameters, which are whole in every process, if DeepSpeed has partitioned `tensor`."""
    if is_partitioned(tensor):
        partitioned: Any = tensor
        partitioned.convert_to_zero_parameters(param_list=[new for new in parameters if not hasattr(new, "ds_id")])


def average_gradient(parameter: Tensor) -> None:
    """Makes the gradient of a whole parameter the mean over all processes, in every backward pass."""
    needed = parameter.requires_grad
    parameter.requires_grad_(True)  # torch allows hooks on no other parameter
    parameter.register_post_accumulate_grad_hook(_average)  # type: ignore[no-untyped-call]
    parameter.requires_grad_(needed)


@torch.no_grad()
def _average(parameter: Tensor) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad.div_(world_size())


@contextmanager
def failing_together() -> Iterator[None]:
    """Turns an error on one rank, inside the block, into an error on all ranks. They would otherwise wait for that
    rank.

    All ranks must enter the block, and call `agree` and `broadcast` in the same order inside it. The failing rank
    raises its own error, the others raise RankError. A block inside another would report an error twice, and wait for
    ranks in vain.
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
    """Returns every rank's `value`, in the order of the ranks. Raises RankError if a rank failed before this call."""
    values, errors = zip(*_gather(value, None), strict=True)
    for other, error in enumerate(errors):
        if error is not None:
            raise RankError(f"rank {other} failed, so this one stops too [P046]. The error there: {error}")
    return list(values)


def _gather(value: object, error: str | None) -> list[tuple[Any, str | None]]:
    results: list[Any] = [(value, error)] * world_size()
    if len(results) > 1:
        dist.all_gather_object(results, (value, error))
    return results


def owners(sizes: Mapping[str, int]) -> dict[str, int]:
    """The rank that works on each item. The largest items are assigned first, each to the rank with least work so
    far."""
    loads, owner_of = [0] * world_size(), {}
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        owner_of[name] = loads.index(min(loads))
        loads[owner_of[name]] += sizes[name]
    return owner_of


def broadcast(tensor: Tensor, source: int) -> Tensor:
    """The `tensor` of rank `source`. On other ranks, `tensor` gives shape, dtype and device, and may be overwritten."""
    if world_size() == 1:
        return tensor
    # "cpu:gloo,cuda:nccl": each kind of device with the backend that sends its tensors. NCCL sends only GPU tensors.
    devices = [entry.split(":")[0] for entry in dist.get_backend_config().split(",")]
    carried = tensor.contiguous()
    if tensor.device.type not in devices:
        carried = carried.to(devices[0])
    dist.broadcast(carried, source)
    return carried.to(tensor.device)
