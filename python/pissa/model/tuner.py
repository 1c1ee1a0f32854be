"""What PEFT's functions hand out of a model with our adapters, and take in: an adapter as the plain LoRA that it is,
and the base or nothing.

PEFT asks a class for it, which it finds in its public table of tuners under the configuration's `peft_type`. Ours has a
type of its own there; everything else about it is LoRA's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from torch import Tensor, nn
from transformers.pipelines.base import SUPPORTED_PEFT_TASKS

from pissa.base.stored import StartFactors, StoredLinear
from pissa.config import PissaConfig, PissaType
from pissa.distributed import check_whole, sharded_as
from pissa.files.plain_lora import PREFIX, Factors, Matrices, factors_of, is_of_a_layer, magnitude_key
from pissa.layers.layer import pissa_layers
from pissa.peft_private import LoraTuner


class PissaTuner(LoraTuner):
    """PEFT's LoraModel, from whose state dict `peft.get_peft_model_state_dict` takes an adapter as the plain LoRA of
    rank 2r for the unmodified base, in PEFT's names and layout, float32: lora_A = [A ; dA], lora_B = [dB | B0].

    The parameters themselves hold dA and dB under the names of A and B, and would be another function elsewhere.
    """

    @classmethod
    def adapter_state_dict(
        cls,
        model: Any,
        config: PissaConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: Sequence[str],
    ) -> dict[str, Tensor]:
        """The plain LoRA, the magnitudes of DoRA, and the biases that are trained. Layers whose parameters `state_dict`
        lacks are left out.

        Raises:
            ValueError: a parameter of which this process holds a part only.
        """
        inner = model.base_model.model
        layers = pissa_layers(inner, adapter_name)
        found = super().adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        adapted = pissa_layers(inner)  # PEFT lists what merged layers of other adapters keep
        found = {key: value for key, value in found.items() if not is_of_a_layer(key, adapted)}
        matrices, present = {}, {}
        for name, layer in layers.items():
            keys = [f"{PREFIX}{name}.{key}" for key in layer.state_keys(adapter_name)]
            if not all(key in state_dict for key in keys):
                continue
            check_whole({key: state_dict[key] for key in keys})
            present[name] = layer
            deltas = layer.deltas_in(state_dict, f"{PREFIX}{name}.", adapter_name)
            matrices[name] = layer.start_of(adapter_name).factors_of_change(deltas)
            if config.use_dora:
                key = magnitude_key(name)
                magnitude = layer.magnitude(adapter_name)
                weight = state_dict[f"{key}.{adapter_name}.weight"].detach()
                found[key] = magnitude.lengths(weight.to(magnitude.base_lengths.device)).clone()
        for factors in factors_of(inner, present):
            found |= factors.pack([matrices[name] for name in factors.layers])
        return found

    @classmethod
    def parameters_to_load(
        cls, model: Any, config: PissaConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What `peft.set_peft_model_state_dict` puts into the model, under the parameters' names: dA and dB for the
        factors in `state_dict`. Those of rank 2r are what this adapter was handed out as. Those of rank r are any plain
        LoRA's: they become A and B of an adapter that starts at zero.

        Raises:
            ValueError: factors of other layers, shapes or start. Nothing has been changed then.
        """
        remap = super().parameters_to_load
        inner = model.base_model.model
        layers = pissa_layers(inner, adapter_name)
        parts = factors_of(inner, layers)
        taken = {key for part in parts for key in part.keys}
        if not taken & state_dict.keys():
            return remap(model, config, adapter_name, state_dict)
        if config.use_adalora:
            raise ValueError(
                f"adapter {adapter_name!r} has use_adalora, and a plain LoRA does not have its singular values: load "
                "the folder that save_pretrained wrote, model.load_adapter(folder, name)"
            )
        is_any_lora = _is_of_rank({name: layer.r[adapter_name] for name, layer in layers.items()}, parts, state_dict)
        deltas: dict[str, Matrices] = {}
        for part in parts:
            deltas |= part.unpack(*(state_dict[key].detach() for key in part.keys))
        if not is_any_lora:
            starts = {name: layer.start_of(adapter_name) for name, layer in layers.items()}
            deltas = {name: _without_start(*pair, starts[name], name) for name, pair in deltas.items()}
        rest = {key: value for key, value in state_dict.items() if key not in taken}
        found = remap(model, config, adapter_name, rest)
        for name, layer in layers.items():
            parameters, values = layer.factor_parameters(adapter_name), layer.as_parameters(*deltas[name])
            for key, parameter, value in zip(layer.state_keys(adapter_name), parameters, values, strict=True):
                found[f"{PREFIX}{name}.{key}"] = sharded_as(parameter, value)
        if is_any_lora:
            config.init = "given"
            for layer in layers.values():
                layer.start_at_zero(adapter_name, config)
        return found


def _is_of_rank(ranks: Mapping[str, int], parts: Sequence[Factors], state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the factors in a state dict have these ranks; False if they have twice these.

    Raises:
        ValueError: a factor is missing, or has another shape.
    """
    found = {key: tuple(state_dict[key].shape) for part in parts for key in part.keys if key in state_dict}
    misfits = []
    for times in (1, 2):
        needed: dict[str, tuple[int, ...]] = {}
        for part in parts:
            needed |= part.shapes(times * ranks[next(iter(part.layers))])
        if found == needed:
            return times == 1
        misfits.append({key: shape for key, shape in needed.items() if found.get(key) != shape})
    nearest = min(misfits, key=len)
    key, shape = next(iter(nearest.items()))
    raise ValueError(
        f"the state dict does not fit the adapter: {key} is {list(found[key]) if key in found else 'missing'}; needed: "
        f"{list(shape)}. All layers of the adapter need factors of its rank, or of twice that, as "
        "get_peft_model_state_dict gives them"
    )


def _without_start(a: Tensor, b: Tensor, start: StartFactors, name: str) -> Matrices:
    """dA and dB out of [A ; dA] and [dB | B0].

    Raises:
        ValueError: the factors do not hold this start.
    """
    r, device = len(start.a0), start.a0.device
    a, b = a.to(device), b.to(device)
    da, db = a[r:], b[:, :r]
    if not (torch.equal(a[:r], start.a0 + da) and torch.equal(b[:, r:], start.b0)):
        raise ValueError(
            f"the state dict does not fit the adapter: in layer {name} it is of twice the rank, but not [A ; dA] and "
            "[dB | B0] with this adapter's start factors, in float32. To have another adapter beside this one: "
            "model.load_adapter(folder, name)"
        )
    return da, db


def guard_state_dict(base: nn.Module) -> None:
    """Makes `base.state_dict()` refuse, for as long as its layers keep residuals in the place of their weights.

    `peft.get_base_model_state_dict` calls it, and would hand out the residuals under the weights' names. Within the
    state dict of a PissaModel the parameters of `base` are what they are.
    """
    base.register_state_dict_pre_hook(_refuse_residuals)  # type: ignore[no-untyped-call]


def unguard_state_dict(base: nn.Module) -> None:
    """Takes back what `guard_state_dict` did."""
    hooks = base._state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _refuse_residuals]:
        del hooks[key]


def _refuse_residuals(base: nn.Module, prefix: str, keep_vars: bool) -> None:
    if prefix:
        return
    for name, module in base.named_modules():
        if isinstance(module, StoredLinear):
            raise ValueError(
                f"the base has no state dict of its own: {name} keeps a residual stored as {module.form.describe()}, "
                "not its weight. Take the state dict of the PissaModel, which has all of it, or the base's after "
                "model.unload(), as dense weights"
            )


def register() -> None:
    """Adds what PEFT and transformers have to know of us to their public tables; what is there stays."""
    PEFT_TYPE_TO_TUNER_MAPPING[PissaType.PISSA] = PissaTuner
    PEFT_TYPE_TO_PREFIX_MAPPING[PissaType.PISSA] = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LORA]
    for names in SUPPORTED_PEFT_TASKS.values():
        ours = [f"Pissa{name.removeprefix('Peft')}" for name in names if name.startswith("Peft")]
        names.extend(name for name in ours if name not in names)
