"""The start of an adapter that has been injected: each layer's base is decomposed, by one process or by several."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pissa import distributed
from pissa.base.init_methods import Factors, start_factors
from pissa.base.stored import StartFactors
from pissa.base.weights import execution_device
from pissa.config import IMPLICIT, PissaConfig
from pissa.files.expert_layout import check_uniform
from pissa.layers.factory import leave_out
from pissa.layers.layer import PissaLayer, pissa_layers
from pissa.layers.linear import PissaLinear

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
    if config.init == "given":
        raise ValueError(
            "init='given' is of an adapter whose factors came from elsewhere, and gives none. To copy one: "
            "model.add_weighted_adapter([name], [1.0], new_name, 'cat'). To take over a plain LoRA: make the adapter "
            "with any other init, then call peft.set_peft_model_state_dict"
        )
    layers = pissa_layers(model, adapter_name)
    stored = _to_store(model, layers, config, first)
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
        if name in stored:
            layer.store_base(layer.residual(starts[name], config.form), starts[name], config)
        layer.start_from(adapter_name, starts[name])
    if distributed.world_size() > 1:
        kept = {name: layer for name, layer in layers.items() if layer.form != IMPLICIT}
        _share_fingerprints(kept, PissaLayer.residual_fingerprint, PissaLayer.learn_residual_fingerprint)


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


def _to_store(model: nn.Module, layers: dict[str, PissaLayer], config: PissaConfig, first: bool) -> set[str]:
    """The layers whose dense base is to be replaced by a residual. Weights that are tied to another module's stay as
    they are, which is warned of."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    stored, tied = set(), []
    for name, layer in layers.items():
        if config.form in (IMPLICIT, layer.form):
            continue
        if not isinstance(layer, PissaLinear):
            raise ValueError(
                f"layer {name} is a {type(layer.unmerged_base).__name__}, whose base stays as it is and cannot become "
                f"{config.form.describe()}; {leave_out(name)}"
            )
        if layer.form == IMPLICIT and uses[id(layer.unmerged_base.weight)] > 1:
            tied.append(name)
            continue
        if not first or layer.form != IMPLICIT:
            raise ValueError(
                f"the base of layer {name} is {layer.form.describe()} and cannot become "
                f"{config.form.describe()}: other adapters are changes of the function that it has. "
                "Leave quant and residual out, and the adapter takes the base as it is"
            )
        stored.add(name)
    if tied:
        warnings.warn(
            f"the weight of layer {', '.join(tied)} is tied to another module's, so it stays dense and its adapter is "
            f"implicit, while other layers keep a residual, {config.form.describe()}. Untie the weight to have it "
            "stored, or leave the layer out.",
            UserWarning,
            stacklevel=4,  # the caller of pissa.wrap, or of add_adapter
        )
    return stored


def _warn_of_requantising(layers: dict[str, PissaLayer], config: PissaConfig) -> None:
    quantised = [name for name, layer in layers.items() if isinstance(layer, PissaLinear) and layer.is_quantised]
    if config.form != IMPLICIT and quantised:
        warnings.warn(
            f"bitsandbytes has quantised {len(quantised)} of {len(layers)} layers already, {quantised[0]} the first. "
            f"Each is dequantised and split, and its residual stored as {config.form.describe()}, which rounds a "
            "second time: the base is no longer quite the function that bitsandbytes computes. Leave quant and "
            "residual out, and the adapter takes the quantised weights as they are; or load the model in 16 bits.",
            UserWarning,
            stacklevel=4,  # the caller of pissa.wrap, or of add_adapter
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
