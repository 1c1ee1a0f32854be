"""The adapters and bases that PEFT's functions read from a model with our adapters, or load into it. An adapter is read
as its plain LoRA, and the base is read only if it is whole.

PEFT calls a tuner class, which it looks up in its public table by the configuration's `peft_type`. Our tuner has its
own type in that table. In everything else it is LoRA's tuner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from torch import Tensor, nn
from transformers.pipelines.base import SUPPORTED_PEFT_TASKS

from pissa.adapters.peft_layout import (
    PREFIX,
    FactorTensors,
    Matrices,
    factors_of,
    is_of_a_layer,
    magnitude_key,
    plain_lora,
    rank_multiple,
)
from pissa.base.classes import has_codes, has_our_codes
from pissa.base.start import StartFactors
from pissa.config import IMPLICIT, PissaConfig, PissaType
from pissa.distributed import check_whole, shard_as
from pissa.layers.layer import PissaLayer, pissa_layers
from pissa.ops.low_rank import split_difference
from pissa.peft_private import LoraTuner


class PissaTuner(LoraTuner):
    """PEFT's LoraModel, for which `peft.get_peft_model_state_dict` returns an adapter as the plain LoRA for the
    unmodified base, in PEFT's names and layout, float32: lora_A = [A ; dA], lora_B = [dB | B0], of rank 2r; or, if all
    B0 are zero, A and dB, of rank r. The parameters hold dA and dB under the names of A and B, so loading them
    elsewhere would give another function."""

    @classmethod
    def hand_out(
        cls, model: Any, config: PissaConfig, adapter_name: str, state: Mapping[str, Tensor], tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Returns the plain LoRA, the magnitudes of DoRA, and the trained biases. A layer is left out if `state` lacks
        its parameters. Raises ValueError for a part of a parameter, and for factors under other names."""
        inner = model.base_model.model
        layers = pissa_layers(inner, adapter_name)
        adapted = pissa_layers(inner)  # PEFT also lists the layers that are kept for merged layers of other adapters
        tensors = {key: value for key, value in tensors.items() if not is_of_a_layer(key, adapted)}
        _check_names(state, layers, adapter_name)
        keys = {n: [f"{PREFIX}{n}.{key}" for key in layer.state_keys(adapter_name)] for n, layer in layers.items()}
        layers = {name: layer for name, layer in layers.items() if state.keys() >= set(keys[name])}
        check_whole({key: state[key] for name in layers for key in keys[name]})
        for name, layer in layers.items() if config.use_dora else ():
            key, magnitude = magnitude_key(name), layer.magnitude(adapter_name)
            weight = state[f"{key}.{adapter_name}.weight"].detach()
            tensors[key] = magnitude.lengths(weight.to(magnitude.base_lengths.device)).clone()
        return tensors | plain_lora(inner, layers, adapter_name, state)

    @classmethod
    def take_in(
        cls, model: Any, config: PissaConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns dA and dB for the factors in `state_dict`, and the rest of it. Factors of rank 2r are this adapter's
        own, as `hand_out` returns them. Factors of rank r are any plain LoRA's. If all B0 are zero, they become A and
        B, up to a rounding of A; otherwise they become A and B of an adapter that starts at zero. Nothing is changed
        here; a mark tells `load_whole` what to change. Raises ValueError for factors of other layers, shapes or
        start."""
        inner = model.base_model.model
        layers = pissa_layers(inner, adapter_name)
        parts = factors_of(inner, layers)
        factor_keys = {key for part in parts for key in part.keys}
        if not factor_keys & state_dict.keys():
            return state_dict, {}
        is_any_lora = _is_of_rank({name: layer.r[adapter_name] for name, layer in layers.items()}, parts, state_dict)
        has_start = all(adapter_name in layer.lora_start for layer in layers.values())
        starts_at_zero = is_any_lora and not (has_start and rank_multiple(layers, adapter_name) == 1)
        deltas: dict[str, Matrices] = {}  # for an adapter that starts at zero, the factors themselves
        for part in parts:
            deltas |= part.unpack(*(state_dict[key].detach() for key in part.keys))
        if not starts_at_zero:
            starts = {name: layer.start_of(adapter_name) for name, layer in layers.items()}
            if is_any_lora:
                deltas = {name: (a.to(starts[name].a0.device) - starts[name].a0, b) for name, (a, b) in deltas.items()}
            else:
                deltas = {name: _remove_start(*pair, starts[name], name) for name, pair in deltas.items()}
        tensors = {}
        for name, layer in layers.items():
            parameters, values = layer.factor_parameters(adapter_name), layer.as_parameters(*deltas[name])
            for key, parameter, value in zip(layer.state_keys(adapter_name), parameters, values, strict=True):
                tensors[f"{PREFIX}{name}.{key}"] = shard_as(parameter, value)
        tensors[f"{_STARTS_AT_ZERO}{adapter_name}"] = torch.tensor(starts_at_zero)
        return {key: value for key, value in state_dict.items() if key not in factor_keys}, tensors


_STARTS_AT_ZERO = f"{PREFIX}starts_at_zero."
"""Precedes an adapter's name in the key of the mark. It is not a tensor of the model, but accompanies its factors."""


def load_whole(model: Any, state_dict: Mapping[str, Any], load: Callable[[Mapping[str, Any]], Any]) -> Any:
    """Loads a state dict into a PissaModel with `load`, torch's method. The factors that `take_in` has marked are
    loaded with everything else and with their start. Otherwise the model stays as it was, with torch's error."""
    marks = {key: mark for key, mark in state_dict.items() if key.startswith(_STARTS_AT_ZERO)}
    if not marks:
        return load(state_dict)
    unmarked = {key: value for key, value in state_dict.items() if key not in marks}
    shapes = {key: value.shape for key, value in model.state_dict().items() if key in unmarked}
    misfits = {key: unmarked[key] for key, shape in shapes.items() if unmarked[key].shape != shape}
    if misfits:
        load(misfits)  # which raises; together with others, torch would load those first
    loaded = load(unmarked)
    for name in (key.removeprefix(_STARTS_AT_ZERO) for key, mark in marks.items() if mark):
        start_at_zero(model, name)
    return loaded


def start_at_zero(model: Any, adapter_name: str) -> None:
    """Sets the start factors of an adapter of a PissaModel to zero, so that its parameters are A and B."""
    config = model.peft_config[adapter_name]
    config.init = "given"
    for layer in pissa_layers(model.base_model.model, adapter_name).values():
        layer.lora_start[adapter_name] = layer.zero_start(adapter_name, layer.origin(adapter_name, config))


def _check_names(state_dict: Mapping[str, Tensor], layers: Mapping[str, PissaLayer], adapter_name: str) -> None:
    """Raises ValueError for an adapter's factors under names that no layer has, as in the state dict of a part of the
    model. They would be left out, and the caller would mistake a plain base for what was trained."""
    known = {f"{PREFIX}{name}.{key}" for name, layer in layers.items() for key in layer.state_keys(adapter_name)}
    endings = tuple({f".{key}" for layer in layers.values() for key in layer.state_keys(adapter_name)})
    for name in state_dict:
        if f".{name}".endswith(endings) and name not in known:
            raise ValueError(
                f"the state dict has {name}, which is not a name in the whole model's: give the state dict of the "
                "PissaModel, or a part of that with its names. pissa.lora_state_dict(model) gathers what FSDP2 has "
                "sharded [P063]"
            )


def _is_of_rank(ranks: Mapping[str, int], parts: Sequence[FactorTensors], state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the factors in a state dict have these ranks; False if they have twice these ranks. Raises ValueError if
    a factor is missing or has another shape."""
    shapes = {key: tuple(state_dict[key].shape) for part in parts for key in part.keys if key in state_dict}
    misfits = {}
    for times in (1, 2):
        needed = [item for part in parts for item in part.shapes(times * ranks[part.layers[0]]).items()]
        misfits[times] = [(key, shape) for key, shape in needed if shapes.get(key) != shape]
    nearest = min(misfits, key=lambda times: len(misfits[times]))
    if not misfits[nearest]:
        return nearest == 1
    key, shape = misfits[nearest][0]
    raise ValueError(
        f"the state dict does not fit the adapter: {key} is {list(shapes[key]) if key in shapes else 'missing'}; "
        f"needed: {list(shape)}. All layers of the adapter need factors of its rank, or of twice that, as "
        "get_peft_model_state_dict gives them [P063]"
    )


def _remove_start(a: Tensor, b: Tensor, start: StartFactors, name: str) -> Matrices:
    """Extracts dA and dB from [A ; dA] and [dB | B0]. Raises ValueError if these do not contain this start."""
    device = start.a0.device
    upper, da, db, b0 = split_difference(a.to(device), b.to(device))
    if not (torch.equal(upper, start.a0 + da) and torch.equal(b0, start.b0)):
        raise ValueError(
            f"the state dict does not fit the adapter: in layer {name} it is of twice the rank, but not [A ; dA] and "
            "[dB | B0] with this adapter's start factors, in float32. To add it as another adapter: "
            "model.load_adapter(folder, name) [P063]"
        )
    return da, db


BUILDING = ContextVar("BUILDING", default=False)
"""Whether a PissaModel is being constructed: its constructor asks for a tuner, not for a PeftModel of PEFT."""


def refuse_residuals(base: nn.Module, prefix: str, keep_vars: bool) -> None:
    """A hook of `base.state_dict()`, which `peft.get_base_model_state_dict` and transformers' `save_pretrained` call.
    Raises ValueError as long as layers keep residuals, or codes of ours, under the names of their weights. A
    PissaModel's state dict contains these as they are."""
    if prefix:
        return
    for name, layer in pissa_layers(base).items():
        form = layer.base.form
        if form != IMPLICIT:
            raise ValueError(
                f"the base has no state dict of its own: {name} keeps a residual stored as {form.describe()}, "
                "not its weight. Take the state dict of the PissaModel, which has all of it, or the base's after "
                "model.unload(), as dense weights [P063]"
            )
    _refuse(base, has_our_codes)


def refuse_codes(base: nn.Module, prefix: str, keep_vars: bool) -> None:
    """The same for a model without adapters in which codes are left that its configuration does not describe."""
    if not prefix:
        _refuse(base, has_codes)


def _refuse(base: nn.Module, is_in_codes: Callable[[nn.Module], bool]) -> None:
    if name := next((name for name, module in base.named_modules() if is_in_codes(module)), None):
        raise ValueError(
            f"the model has no state dict of its own: {name} is in codes, which nothing would read under the name of a "
            "weight. For a dense model, call merge_and_unload() instead of unload(), or save the adapter and run "
            "`pissa merge ADAPTER OUT --base BASE`; the codes alone are what was loaded [P134]"
        )


# Registers our classes in the public tables of PEFT and transformers. All other entries stay as they are.
PEFT_TYPE_TO_TUNER_MAPPING[PissaType.PISSA] = PissaTuner
PEFT_TYPE_TO_PREFIX_MAPPING[PissaType.PISSA] = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LORA]
for _names in SUPPORTED_PEFT_TASKS.values():
    _ours = [f"Pissa{name.removeprefix('Peft')}" for name in _names if name.startswith("Peft")]
    _names.extend(name for name in _ours if name not in _names)
