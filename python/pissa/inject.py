"""Putting PissaLayers into a model: what can be adapted, where it starts, the way back on failure."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from pissa import distributed
from pissa.bases import CONVOLUTIONS, execution_device, is_bitsandbytes, is_linear, is_offloaded
from pissa.config import IMPLICIT, PissaConfig
from pissa.convolution import PissaConv1d, PissaConv2d, PissaConv3d
from pissa.distributed import is_partitioned, is_sharded
from pissa.embedding import PissaEmbedding
from pissa.experts import check_uniform
from pissa.layer import PissaLayer
from pissa.linear import PissaLinear
from pissa.nf4 import HoldsNf4, Nf4Base, check_int8, from_bitsandbytes
from pissa.starts import Factors, start_factors
from pissa.stored import StartFactors

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layer_factory(model: nn.Module) -> Callable[..., PissaLayer]:
    """`pissa_layer` for the layers of `model`."""
    dtypes = (
        parameter.dtype
        for name, module in model.named_modules()
        if not isinstance(module, HoldsNf4) and ".lora_" not in name
        for parameter in module.parameters(recurse=False)
        if type(parameter) is nn.Parameter and parameter.is_floating_point()
    )
    return partial(pissa_layer, model_dtype=next(dtypes, torch.get_default_dtype()))


def pissa_layer(
    target: nn.Module, adapter_name: str, config: PissaConfig, *, model_dtype: torch.dtype, **kwargs: Any
) -> PissaLayer:
    """The PissaLayer for `target`, a layer of a model that computes in `model_dtype`.

    Raises:
        TypeError, ValueError: naming the layer, why it cannot be adapted, and what to do instead.
    """
    name = kwargs["target_name"]
    if kwargs.get("parameter_name") is not None:
        raise TypeError(
            f"{name} is a parameter of {type(target).__name__}; PiSSA adapts layers and fused experts: name them in "
            "target_modules"
        )
    base, kind = _base_and_kind(target, name)
    _check_weight(base, name)
    if config.use_dora and kind is not PissaLinear:
        raise TypeError(f"{name} is a {type(target).__name__}, and use_dora is for linear layers; {_leave_out(name)}")
    layer = kind(target, adapter_name, config, model_dtype=model_dtype, **kwargs)
    layer.base_layer = base  # which PEFT would warn of, where it is not the target, as of a kind that it does not know
    return layer


_KINDS: tuple[tuple[type[nn.Module], type[PissaLayer]], ...] = (
    (nn.Linear, PissaLinear),
    (Conv1D, PissaLinear),
    (nn.Embedding, PissaEmbedding),
    (nn.Conv1d, PissaConv1d),
    (nn.Conv2d, PissaConv2d),
    (nn.Conv3d, PissaConv3d),
)


def _base_and_kind(target: nn.Module, name: str) -> tuple[nn.Module, type[PissaLayer]]:
    try:
        if is_bitsandbytes(target, "Linear4bit"):
            return from_bitsandbytes(target), PissaLinear
        if is_bitsandbytes(target, "Linear8bitLt"):
            check_int8(target)
            return target, PissaLinear
    except TypeError as error:
        raise TypeError(f"{name} is a {type(target).__name__} of bitsandbytes, but {error}") from None
    for base, kind in _KINDS:
        # A subclass may compute anything; those of embeddings multiply by a scale.
        if (
            type(target) is base
            or (base is nn.Linear and is_linear(target))
            or (base is nn.Embedding and isinstance(target, base) and hasattr(target, "embed_scale"))
        ):
            _check_options(target, name)
            return target, kind
    found = f"{type(target).__module__}.{type(target).__qualname__}"
    if isinstance(target, BaseTunerLayer):
        raise TypeError(f"{name} already carries an adapter of another kind ({found}); unload it first")
    raise TypeError(f"{name} is a {found}; PiSSA adapts {_ADAPTED}; {_leave_out(name)}")


_ADAPTED = "nn.Linear, Conv1D, nn.Embedding, nn.Conv1d to 3d, bitsandbytes' layers and transformers' fused experts"


def _check_options(target: nn.Module, name: str) -> None:
    if isinstance(target, CONVOLUTIONS) and target.groups > 1:
        raise TypeError(
            f"{name} is a {type(target).__name__} with groups={target.groups}, whose weight is not one matrix; "
            f"{_leave_out(name)}"
        )
    if isinstance(target, nn.Embedding) and target.max_norm is not None:
        raise TypeError(
            f"{name} is an Embedding with max_norm={target.max_norm}, which changes its own weight; {_leave_out(name)}"
        )


def _check_weight(base: nn.Module, name: str) -> None:
    weight: Any = base.weight
    if is_partitioned(weight):
        raise TypeError(
            f"the weight of {name} is partitioned by DeepSpeed ZeRO-3 (its shape is {list(weight.ds_shape)}) and holds "
            "no values here: wrap the model inside `with deepspeed.zero.GatheredParameters(model.parameters()):`, or "
            "load it without zero.Init and let deepspeed.initialize partition it after it is wrapped"
        )
    if is_sharded(weight):
        raise TypeError(
            f"the weight of {name} is a DTensor, sharded by fully_shard or a tensor-parallel plan, and PiSSA "
            "decomposes whole weights: wrap the model first and shard it then, fully_shard(pissa.wrap(model, ...))"
        )
    if weight.is_meta and not is_offloaded(base):
        raise ValueError(
            f"the weight of {name} is on the meta device and holds no values: load or materialise it first (a model "
            "that accelerate offloads, device_map=..., is fetched layer by layer)"
        )
    if isinstance(base, Nf4Base) or is_bitsandbytes(base, "Linear8bitLt"):
        return
    if type(weight) is not nn.Parameter or weight.dtype not in _DTYPES:
        raise TypeError(
            f"the weight of {name} is a {type(weight).__name__} of {weight.dtype}, but PiSSA decomposes "
            "plain float32, bfloat16 and float16 weights: load the model in one of these "
            '(quant="nf4" then stores it in 4 bits)'
        )


def _leave_out(name: str) -> str:
    return f"leave it out of target_modules or add {name.rpartition('.')[2]!r} to exclude_modules"


def pissa_layers(model: nn.Module, adapter_name: str) -> dict[str, PissaLayer]:
    """The layers of an (unwrapped) model that carry the adapter, by their name in the model."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PissaLayer) and adapter_name in module.r
    }


def check_parents(model: nn.Module, adapter_name: str) -> None:
    """Raises TypeError, naming the layer, where its parent would compute without it and so without its adapter."""
    for name in pissa_layers(model, adapter_name):
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            raise TypeError(
                f"{name} is in a {type(parent).__name__}, which in evaluation computes from the weights of its layers "
                "and would leave the adapter out: call torch.backends.mha.set_fastpath_enabled(False) first, or "
                f"{_leave_out(name)}"
            )


def materialise(model: nn.Module, adapter_name: str) -> None:
    """Puts the parameters of a new adapter, which are zero, where its layers compute: PEFT takes them to the base's
    weights, which for a base that accelerate offloads is the meta device."""
    for layer in pissa_layers(model, adapter_name).values():
        device = execution_device(layer.unmerged_base)
        parts = [getattr(layer, name) for name in layer.adapter_layer_names]
        for part in (part for part in parts if adapter_name in part):
            found = part[adapter_name]
            if isinstance(found, Tensor):
                if found.is_meta:
                    zeros = torch.zeros_like(found, device=device)
                    part[adapter_name] = nn.Parameter(zeros, requires_grad=found.requires_grad)
            elif any(parameter.is_meta for parameter in found.parameters()):
                for parameter in found.to_empty(device=device).parameters():
                    nn.init.zeros_(parameter)


# Elements of the layers that are decomposed at once, for each thread: enough for the threads to finish together, few
# enough for the bar to move, and for the dense weights (float32, 16 MB) that stored bases are decomposed from.
_GROUP = 1 << 22
# The same on a GPU, which decomposes weights of one shape together: some 30 of the layers of a 7B model.
_GPU_GROUP = 1 << 30


def decompose(model: nn.Module, adapter_name: str, config: PissaConfig, *, first: bool, progressbar: bool) -> None:
    """Starts an adapter that has just been injected from the principal singular vectors of each layer's base.

    Where torch.distributed has several processes, all of them have to call this. Each decomposes some of the layers and
    gives the others what it found, so that all have the same bits. An error on one rank does not stop the others: see
    `distributed.failing_together`.

    `first`: the model has no other adapter, so that a dense base may still be replaced by a stored one.

    Raises:
        ValueError: naming the layer: NaN or Inf in its weight, a form that it cannot have, a model or a configuration
            that is not the same on all ranks.
    """
    layers = pissa_layers(model, adapter_name)
    _check_forms(model, layers, config, first)
    _warn_of_requantising(layers, config)
    check_uniform(model, {name: (layer.r[adapter_name], layer.scaling[adapter_name]) for name, layer in layers.items()})
    origins = {name: layer.origin(adapter_name, config) for name, layer in layers.items()}
    starts = {name: start for name, layer in layers.items() if (start := layer.known_start(origins[name])) is not None}
    if distributed.world_size() > 1:
        _check_same_on_all_ranks(layers, starts, config)
        _share_fingerprints(layers, PissaLayer.base_fingerprint, PissaLayer.learn_base_fingerprint)
    unknown = {name: layer for name, layer in layers.items() if name not in starts}
    owners = distributed.owners({name: math.prod(layer.matrix_shape) for name, layer in unknown.items()})
    mine = {name: layer for name, layer in unknown.items() if owners[name] == distributed.rank()}
    factors: dict[str, Factors] = {}
    # tqdm reads TQDM_DISABLE only where it is not told whether to be disabled.
    with tqdm(total=len(mine), desc="PiSSA init", unit="layer") if progressbar else nullcontext() as bar:
        for group in _groups(mine):
            weights = [layer.dense_base() for layer in group.values()]
            found = start_factors(weights, [origins[name] for name in group], config, list(group))
            factors |= zip(group, found, strict=True)
            if bar is not None:
                bar.update(len(group))
    for name, layer in unknown.items():
        if name not in factors:
            factors[name] = layer.empty_factors(adapter_name)
    distributed.agree()  # nothing between here and the last broadcast can fail on one rank alone
    for name in unknown:
        a0, b0 = (distributed.broadcast(factor, owners[name]) for factor in factors.pop(name))
        starts[name] = StartFactors(a0, b0, origins[name])
    for name, layer in layers.items():
        layer.start_from(adapter_name, starts[name], config)
    if distributed.world_size() > 1:
        stored = {name: layer for name, layer in layers.items() if layer.form != IMPLICIT}
        _share_fingerprints(stored, PissaLayer.residual_fingerprint, PissaLayer.learn_residual_fingerprint)


def _check_same_on_all_ranks(layers: dict[str, PissaLayer], starts: Container[str], config: PissaConfig) -> None:
    """Raises ValueError, on all ranks, where one has another model or configuration than the first, or knows the start
    factors of other layers already."""
    mine = {name: (_checksum(layer.unmerged_base.weight), name in starts) for name, layer in layers.items()}
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in _MAY_DIFFER}
    (first, first_fields), *others = distributed.agree((mine, fields))
    for number, (other, other_fields) in enumerate(others, start=1):
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"the model differs between processes: layer {name} has other weights on rank {number} than on "
                    "rank 0, or other adapters. Load the same checkpoint in every process (not on rank "
                    "0 alone, as fsdp_cpu_ram_efficient_loading does), or draw random weights with the same seed"
                )
        for name in first_fields:
            if other_fields[name] != first_fields[name]:
                raise ValueError(
                    f"the configuration differs between processes: {name} is {first_fields[name]!r} on rank 0 and "
                    f"{other_fields[name]!r} on rank {number}; give every process the same one"
                )


def _checksum(weight: Tensor) -> tuple[tuple[int, ...], int | None]:
    """Shape and, of values that are in memory, what differs where they do; in any order, but as fast as memory is."""
    return tuple(weight.shape), None if weight.is_meta else int(torch.hash_tensor(weight.detach()).item())


def _share_fingerprints(
    layers: dict[str, PissaLayer], compute: Callable[[PissaLayer], str], learn: Callable[[PissaLayer, str], None]
) -> None:
    """Each rank computes some, for hashing takes longer than decomposing on a GPU. Saving asks for them on one rank
    alone, when the weights may be sharded."""
    owners = distributed.owners({name: math.prod(layer.matrix_shape) for name, layer in layers.items()})
    mine = {name: compute(layers[name]) for name, owner in owners.items() if owner == distributed.rank()}
    for found in distributed.agree(mine):
        for name, value in found.items():
            learn(layers[name], value)


_MAY_DIFFER = ("base_model_name_or_path", "runtime_config")  # a path may be another on each machine


def _check_forms(model: nn.Module, layers: dict[str, PissaLayer], config: PissaConfig, first: bool) -> None:
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, layer in layers.items():
        if config.form in (IMPLICIT, layer.form):
            continue
        if not isinstance(layer, PissaLinear):
            raise ValueError(
                f"layer {name} is a {type(layer.unmerged_base).__name__}, whose base stays as it is and cannot become "
                f"{config.form.describe()}; {_leave_out(name)}"
            )
        if not first or layer.form != IMPLICIT:
            raise ValueError(
                f"the base of layer {name} is {layer.form.describe()} and cannot become "
                f"{config.form.describe()}: other adapters are changes of the function that it has. "
                "Leave quant and residual out, and the adapter takes the base as it is"
            )
        if uses[id(layer.unmerged_base.weight)] > 1:
            raise ValueError(
                f"the weight of layer {name} is tied to another module, so it cannot be replaced by a "
                f"residual stored as {config.form.describe()}: use the implicit residual, untie the "
                "weight, or leave the layer out"
            )


def _warn_of_requantising(layers: dict[str, PissaLayer], config: PissaConfig) -> None:
    quantised = [name for name, layer in layers.items() if isinstance(layer, PissaLinear) and layer.is_quantised]
    if config.form != IMPLICIT and quantised:
        warnings.warn(
            f"bitsandbytes has quantised {len(quantised)} of {len(layers)} layers already, {quantised[0]} the first. "
            f"Each is dequantised and split, and its residual stored as {config.form.describe()}, which rounds a "
            "second time: the base is no longer quite the function that bitsandbytes computes. Leave quant and "
            "residual out, and the adapter takes the quantised weights as they are; or load the model in 16 bits.",
            UserWarning,
            stacklevel=7,  # the caller of pissa.wrap
        )


def _groups(layers: dict[str, PissaLayer]) -> Iterator[dict[str, PissaLayer]]:
    """The layers, in order, in groups on one device of at most `_GROUP` elements a thread, `_GPU_GROUP` on a GPU, or of
    one layer that is larger."""
    group: dict[str, PissaLayer] = {}
    size = 0
    group_device = None
    for name, layer in layers.items():
        elements = math.prod(layer.matrix_shape)
        device = execution_device(layer.unmerged_base)
        limit = _GROUP * torch.get_num_threads() if device.type == "cpu" else _GPU_GROUP
        if group and (size + elements > limit or device != group_device):
            yield group
            group, size = {}, 0
        group_device = device
        group[name] = layer
        size += elements
    if group:
        yield group


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Leaves `model` as it was when the block that adds an adapter fails: every module's attributes,
    children, parameters and hooks, and every parameter's flag.

    Nothing is copied, so a parameter that the block writes into is not restored; but the dense weights that
    it replaces stay in memory until it ends.
    """
    modules = [(module, vars(module).copy()) for module in model.modules()]
    # PEFT keeps one dictionary of configurations in several modules: its content is restored, in place.
    containers = [
        (value, value.copy())
        for _, attributes in modules
        for value in attributes.values()
        if isinstance(value, (dict, list))
    ]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, attributes in modules:
            vars(module).clear()
            vars(module).update(attributes)
        for container, content in containers:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, flag in flags:
            if parameter.requires_grad != flag:  # a parameter that torch makes lazily can be asked, but not told
                parameter.requires_grad_(flag)
        raise
