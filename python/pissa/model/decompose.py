"""Starts an injected adapter: one process or several decompose the base of each layer."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pissa import distributed
from pissa.adapters.peft_layout import check_uniform
from pissa.base.digest import fingerprint, xxh3_of_text
from pissa.base.init_methods import INIT_METHODS, StartTask, start_with_codes
from pissa.base.protocol import Base, unshard
from pissa.base.remembered import ResidualFingerprint
from pissa.base.start import Origin, StartFactors
from pissa.base.stored import ResidualCheck, residual_from, residual_shapes, residual_tensors
from pissa.config import IMPLICIT, PissaConfig
from pissa.layers.factory import check_values, leave_out
from pissa.layers.layer import PissaLayer, pissa_layers
from pissa.layers.modules import PissaLinear
from pissa.model.calibration import Calibration, SecondMoments
from pissa.notices import RequantizedWarning, TiedWeightWarning
from pissa.ops import QuantizedWeight

# How many elements of layers are decomposed at once, for each thread. Enough for the threads to finish together, and
# few enough for the progress bar to move and to limit the memory of stored bases' dense weights (float32, 16 MB).
_GROUP = 1 << 22
# The same for a GPU, which decomposes weights of one shape together. Those that are copied first take 4 GiB in float32.
_GPU_GROUP = 1 << 30

_MAY_DIFFER = ("base_model_name_or_path", "runtime_config")  # machines may store the model in different folders


class Replacement(NamedTuple):
    """A layer whose dense base is to be replaced by a stored residual."""

    layer: PissaLayer
    base_start: StartFactors
    """The start that will be taken out of the residual."""
    start: StartFactors
    """The adapter's start."""
    codes: QuantizedWeight | None = None
    """The residual if it does not follow from weight and start: the codes of error feedback."""


def decompose(
    model: nn.Module,
    adapter_name: str,
    config: PissaConfig,
    *,
    progressbar: bool,
    keep_bases: bool = False,
    calibration: SecondMoments | None = None,
) -> dict[str, Replacement]:
    """Starts an adapter that has just been injected: computes the start factors that `config` asks for from the base of
    each of its layers, and gives them to the layers that keep their bases. `store` replaces the other bases.

    With several processes (torch.distributed), all of them must call this function. Each decomposes some of the layers
    and sends the results to the others, so that all have the same bits. An error on one rank does not stop the others;
    see `distributed.failing_together`.

    Args:
        model: the (unwrapped) model.
        keep_bases: whether the layers keep their bases, whatever their form. The bases have been set already.
        calibration: second moments of the layers' inputs, if the configuration needs them.

    Returns:
        The work left for `store`, by layer name. From here on, no weight can make it fail.

    Raises:
        ValueError: NaN or Inf in a layer's weight, or a form that the layer cannot have (the message names the layer);
            or a model or a configuration that is not the same on all ranks.
    """
    if INIT_METHODS[config.init].is_given:
        raise ValueError(
            f"init={config.init!r} marks an adapter whose factors came from elsewhere, and cannot start one. To copy "
            "one: save it, and call model.load_adapter(folder, new_name). To take over a plain LoRA: make the "
            "adapter with any other init, then call peft.set_peft_model_state_dict [P029]"
        )
    check_values(model, adapter_name)
    layers = pissa_layers(model, adapter_name)
    if config.merge_aware and not any(layer.base.is_quantised for layer in layers.values()):
        raise ValueError("merge_aware: got True, and no layer of the model that is adapted is in codes: leave it out")
    if config.merge_aware and any(distributed.is_sharded(layer.base.parameter) for layer in layers.values()):
        raise ValueError("merge_aware: got True, and the model is sharded; codes are merged whole: leave it out")
    stored = {} if keep_bases else _to_store(model, adapter_name, layers, config)
    _warn_of_requantising(layers, config)
    check_uniform(model, {name: (layer.r[adapter_name], layer.scaling[adapter_name]) for name, layer in layers.items()})
    origins = {name: layer.origin(adapter_name, config) for name, layer in layers.items()}
    starts = {name: start for name, layer in layers.items() if (start := layer.known_start(origins[name])) is not None}
    if distributed.world_size() > 1:
        _check_same_on_all_ranks(layers, starts, config, calibration)
    share_fingerprints(layers, lambda layer: layer.weight_fingerprint)

    base_origins = {name: layer.origin(adapter_name, config.of_base()) for name, layer in stored.items()}
    own_origins = {
        name: origin
        for name, origin in origins.items()
        if name not in starts and not (config.starts_as_base and name in stored)
    }
    total = sum(
        list(_owners(layers, names).values()).count(distributed.rank()) for names in (base_origins, own_origins)
    )
    hidden = {} if progressbar else {"disable": True}  # tqdm reads TQDM_DISABLE only if `disable` is not given
    with tqdm(total=total, desc="PiSSA init", unit="layer", **hidden) as bar:
        find = partial(_find_starts, layers, adapter_name, bar=bar, calibration=calibration)
        base_starts, codes = find(base_origins, config.of_base(), check=ResidualCheck(config.form))
        starts |= base_starts if config.starts_as_base else {}
        starts |= find(own_origins, config.of_adapter())[0]
    for name, layer in layers.items():
        if name not in stored:
            layer.start_from(adapter_name, starts[name])
    residuals = {name: layer for name, layer in layers.items() if layer.base.form != IMPLICIT}
    share_fingerprints(residuals, lambda layer: layer.residual_fingerprint)
    return {
        name: Replacement(layer, base_starts[name], starts[name], codes.get(name)) for name, layer in stored.items()
    }


def _find_starts(
    layers: dict[str, PissaLayer],
    adapter_name: str,
    origins: Mapping[str, Origin],
    config: PissaConfig,
    *,
    bar: tqdm[Any],
    calibration: SecondMoments | None,
    check: ResidualCheck | None = None,
) -> tuple[dict[str, StartFactors], dict[str, QuantizedWeight]]:
    """Returns the starts for these origins and this configuration, by layer name, and the residuals whose codes error
    feedback has found. Each rank computes some of them and sends them to the others. `check` checks whether residuals
    can lack these starts."""
    starts: dict[str, StartFactors] = {}
    residuals: dict[str, QuantizedWeight] = {}
    for group in own_groups({name: layers[name] for name in origins}):
        task = _task(group, origins, config, calibration)
        computed, codes = start_with_codes(task)
        starts |= zip(group, computed, strict=True)
        residuals |= zip(group, codes or (), strict=codes is not None)
        if check is not None:
            for name, weight in zip(group, task.weights, strict=True):
                check.add(name, weight, starts[name])
        del task  # which also frees its weights
        bar.update(len(group))
    # From here to the last broadcast, no rank can fail by itself.
    shares = distributed.agree({name: start.recipe_rank for name, start in starts.items()})
    for owner, share in enumerate(shares):
        for name, recipe_rank in share.items():
            if owner != distributed.rank():
                starts[name] = layers[name].zero_start(adapter_name, origins[name], recipe_rank)
                if config.error_feedback:
                    residuals[name] = _empty_codes(config, layers[name])
            codes_of = residual_tensors(residuals[name]).values() if name in residuals else ()
            for tensor in (*starts[name].buffers(), *(starts[name].recipe or ()), *codes_of):
                if tensor.numel():
                    tensor.copy_(distributed.broadcast(tensor, owner))
    if check is not None:
        check.check()
    return starts, residuals


def _task(
    group: Mapping[str, Base],
    origins: Mapping[str, Origin],
    config: PissaConfig,
    calibration: SecondMoments | None,
) -> StartTask:
    device = next((base.device for base in group.values()), None)  # a process may have no share
    # Decode codes only for a method that reads weights: 16 million of them take 20 ms and load pages of the files.
    reads = INIT_METHODS[config.init].reads_weights or config.form != IMPLICIT
    weights = [base.matrix() if reads or not base.is_quantised else _unread(base) for base in group.values()]
    task = StartTask(weights, [origins[name] for name in group], config, list(group), device=device)
    if not config.needs_calibration or calibration is None:
        return task
    return task._replace(moments=[] if device is None else calibration.of(group, device))


def _unread(base: Base) -> Tensor:
    """A weight of the base's shape, without values."""
    return torch.empty(base.module.out_features, base.module.in_features, device="meta")


def _empty_codes(config: PissaConfig, layer: PissaLayer) -> QuantizedWeight:
    """Memory for the codes that another rank has found."""
    shapes, device = residual_shapes(config.form, layer.matrix_shape), layer.base.device
    parts = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, [dtype]) in shapes.items()}
    codes = residual_from(parts, config.form, layer.matrix_shape)
    assert isinstance(codes, QuantizedWeight)
    return codes


def _check_same_on_all_ranks(
    layers: dict[str, PissaLayer],
    starts: Container[str],
    config: PissaConfig,
    calibration: SecondMoments | None,
) -> None:
    """Raises ValueError on every rank if any rank's model, configuration or calibration differs from rank 0's, or if it
    already holds start factors for other layers. For weights that are in memory and not sharded, the fingerprints are
    compared; `share_fingerprints` computes them again."""
    known = {
        name: layer.weight_fingerprint.of(layer.base)
        for name, layer in layers.items()
        if not layer.base.parameter.is_meta and not distributed.is_sharded(layer.base.parameter)
    }
    known_moments = calibration.moments if isinstance(calibration, Calibration) else {}
    moments = {tensor.data_ptr(): tensor for tensor in known_moments.values()}
    own_layers = {name: (layer.matrix_shape, known.get(name), name in starts) for name, layer in layers.items()}
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in _MAY_DIFFER}
    fields["calibration"] = xxh3_of_text(" ".join(map(fingerprint, moments.values())))
    (first, first_fields), *others = distributed.agree((own_layers, fields))
    for number, (other, other_fields) in enumerate(others, start=1):
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"the model differs between processes: layer {name} has other weights on rank {number} than on "
                    "rank 0, or other adapters. Load the same checkpoint in every process (not only on rank "
                    "0, as fsdp_cpu_ram_efficient_loading does), or draw random weights with the same seed [P047]"
                )
        for name in first_fields:
            if other_fields[name] != first_fields[name]:
                raise ValueError(
                    f"the configuration differs between processes: {name} is {first_fields[name]!r} on rank 0 and "
                    f"{other_fields[name]!r} on rank {number}; give every process the same one [P047]"
                )


def share_fingerprints(layers: dict[str, PissaLayer], of: Callable[[PissaLayer], ResidualFingerprint]) -> None:
    """Computes these fingerprints of the layers, each on one rank, and sends all of them to every rank, if there are
    several processes or the weights are sharded. Saving, on one rank only, needs them if weights may be sharded."""
    if distributed.world_size() == 1 and not _any_sharded(layers):
        return
    computed: dict[str, str] = {}
    for group in own_groups(layers):
        computed |= {name: of(layers[name]).of(base) for name, base in group.items()}
    for share in distributed.agree(computed):
        for name, value in share.items():
            of(layers[name]).remember(layers[name].base, value)


def _to_store(
    model: nn.Module, adapter_name: str, layers: dict[str, PissaLayer], config: PissaConfig
) -> dict[str, PissaLayer]:
    """The layers whose dense base is to be replaced by a residual. A weight that is tied to another module's stays as
    it is, with a warning. Raises ValueError, naming the layer, for a base that cannot be replaced."""
    has_others = any(layer.r.keys() - {adapter_name} for layer in pissa_layers(model).values())
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    stored, tied = {}, []
    for name, layer in layers.items():
        if config.form in (IMPLICIT, layer.base.form):
            continue
        if not isinstance(layer, PissaLinear):
            raise ValueError(
                f"layer {name} is a {type(layer.base.module).__name__}, whose base stays as it is and cannot become "
                f"{config.form.describe()}; {leave_out(name)} [P028]"
            )
        if layer.base.form == IMPLICIT and uses[id(layer.base.parameter)] > 1:
            tied.append(name)
            continue
        if has_others or layer.base.form != IMPLICIT:
            raise ValueError(
                f"the base of layer {name} is {layer.base.form.describe()} and cannot become "
                f"{config.form.describe()}: other adapters are changes to that function. "
                "Leave quant and residual out, and the adapter takes the base as it is [P028]"
            )
        if distributed.is_dtensor(layer.base.parameter):
            raise ValueError(
                f"the weight of layer {name} is sharded by fully_shard, which keeps it, so that its base cannot become "
                f"{config.form.describe()}: wrap the model first and shard it then: fully_shard(pissa.wrap(...)) [P049]"
            )
        stored[name] = layer
    if tied:
        warnings.warn(
            f"the weight of layer {', '.join(tied)} is tied to another module's, so it stays dense and its adapter is "
            f"implicit, while other layers keep a residual, {config.form.describe()}. Untie the weight to have it "
            "stored, or leave the layer out.",
            TiedWeightWarning,
            stacklevel=4,  # the caller of pissa.wrap, or of add_adapter
        )
    return stored


def _warn_of_requantising(layers: dict[str, PissaLayer], config: PissaConfig) -> None:
    quantised = [name for name, layer in layers.items() if layer.base.is_quantised]
    if config.form != IMPLICIT and quantised:
        warnings.warn(
            f"{len(quantised)} of {len(layers)} layers are quantised already, {quantised[0]} the first. Each is "
            f"dequantised and split, and its residual stored as {config.form.describe()}, which rounds a second time, "
            "so the base function changes slightly. Leave quant and residual out, and the adapter takes "
            "the quantised weights as they are; or load the model in 16 bits.",
            RequantizedWarning,
            stacklevel=4,  # the caller of pissa.wrap, or of add_adapter
        )


# ---- Each rank does its share ----------------------------------------------------------------------------------------


def _owners(layers: Mapping[str, PissaLayer], names: Iterable[str]) -> dict[str, int]:
    """The rank that works on each of the named layers."""
    return distributed.owners({name: math.prod(layers[name].matrix_shape) for name in names})


def own_groups(layers: dict[str, PissaLayer]) -> Iterator[dict[str, Base]]:
    """Yields the bases of the layers that this process works on, in groups. If a base's weight is sharded, the base
    comes with the whole weight: all processes gather, one after the other, the weights that one of them needs, and only
    that one keeps them, until it asks for its next group. An error in one process therefore ends the others at their
    next group."""
    owners = _owners(layers, layers)
    shares: list[dict[str, PissaLayer]] = [{} for _ in range(distributed.world_size())]
    for name, layer in layers.items():
        shares[owners[name]][name] = layer
    if not _any_sharded(layers):
        for group in groups(shares[distributed.rank()]):
            yield {name: layer.base for name, layer in group.items()}
        return
    threads = min(distributed.agree(torch.get_num_threads()))
    each = (groups(share, threads=threads) for share in shares)
    for together in itertools.zip_longest(*each, fillvalue=dict[str, PissaLayer]()):
        distributed.agree()
        gathered: dict[str, Base] = {}
        for owner, group in enumerate(together):
            for name, layer in group.items():
                base = unshard(layer.base, distributed.whole_tensor(layer.base.parameter))
                if owner == distributed.rank():
                    gathered[name] = base
                del base
        yield gathered
        gathered.clear()  # the caller's variable still refers to it


def _any_sharded(layers: Mapping[str, PissaLayer]) -> bool:
    return any(distributed.is_sharded(layer.base.parameter) for layer in layers.values())


def groups(layers: dict[str, PissaLayer], *, threads: int | None = None) -> Iterator[dict[str, PissaLayer]]:
    """Yields the layers in groups, each on one device: on the CPU in order, on a GPU by shape and dtype. A group has at
    most `_GROUP` elements for each thread (`_GPU_GROUP` on a GPU), or consists of a single layer. `threads` is the
    number of CPU threads that work on one layer each (default: all)."""
    count = torch.get_num_threads() if threads is None else threads
    alike: dict[tuple[Any, ...], dict[str, PissaLayer]] = {}
    for name, layer in layers.items():
        key: tuple[Any, ...] = (layer.base.device,)
        if layer.base.device.type != "cpu":
            key += (layer.matrix_shape, layer.base.dtype)
        alike.setdefault(key, {})[name] = layer
    for (device, *_), members in alike.items():
        limit = _GROUP * count if device.type == "cpu" else _GPU_GROUP
        group: dict[str, PissaLayer] = {}
        size = 0
        for name, layer in members.items():
            elements = math.prod(layer.matrix_shape)
            if group and size + elements > limit:
                yield group
                group, size = {}, 0
            group[name] = layer
            size += elements
        yield group
