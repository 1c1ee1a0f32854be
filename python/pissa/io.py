"""An adapter on disk: a plain LoRA for every other runtime, and beside it what an exact restart needs.

    adapter_config.json         PEFT's, for a plain LoRA of rank 2r on the unmodified base
    adapter_model.safetensors   PEFT's: lora_A = [A ; dA], lora_B = [dB | B0]
    pissa.json                  the PissaConfig, and for each layer a fingerprint of its base
    pissa.safetensors           A0 (B0, dA and dB are above), and the factors of a stored base that are not
                                the adapter's own

Start factors are frozen, so the files of two saves of one run fit each other. That the upper half of lora_A
is A0 + dA to the bit shows that they do.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import pissa
from pissa import ops
from pissa.config import Form, PissaConfig
from pissa.experts import adapted_names, places, stack, unfused_experts
from pissa.files import Staged
from pissa.fingerprint import fingerprint
from pissa.inject import pissa_layers
from pissa.layer import PissaLayer
from pissa.stored import Origin, StoredLinear

if TYPE_CHECKING:
    from pissa.model import PissaModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PISSA_RECORD = "pissa.json"
PISSA_WEIGHTS = "pissa.safetensors"
FORMAT = 1

PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """What pissa.json says of one layer: the adapter's rank and scaling, and the base that it belongs to."""

    r: int
    scaling: float
    weight: str
    """Fingerprint of the base's dense weight."""
    form: Form
    stored: str | None = None
    """Fingerprint of the stored residual."""
    base: Origin | None = None
    """Origin of the start factors of a stored base, where they are not the adapter's."""

    @staticmethod
    def of(layer: PissaLayer, adapter_name: str) -> LayerRecord:
        base, start = layer.unmerged_base, layer.start_of(adapter_name)
        record = LayerRecord(start.origin.r, start.origin.scaling, layer.base_fingerprint(), layer.form)
        if not isinstance(base, StoredLinear):
            return record
        shared = base.start is start
        return dataclasses.replace(
            record,
            stored=residual_fingerprint(base.residual),
            base=None if shared else base.start.origin,
        )

    def as_json(self) -> dict[str, Any]:
        record = dataclasses.asdict(self) | {"form": self.form._asdict()}
        return record | {"base": None if self.base is None else self.base._asdict()}

    @staticmethod
    def from_json(record: dict[str, Any]) -> LayerRecord:
        base = record["base"]
        return LayerRecord(
            **record | {"form": Form(**record["form"]), "base": None if base is None else Origin(**base)}
        )


def residual_fingerprint(residual: Tensor | ops.Nf4Weight) -> str:
    """Fingerprint of a stored residual: its dense values, or its codes and scales."""
    if isinstance(residual, Tensor):
        return fingerprint(residual)
    parts = (residual.codes, residual.absmax, residual.nested_absmax, residual.offset)
    return fingerprint(*(part for part in parts if part is not None))


def save_adapter(
    model: PissaModel,
    adapter_name: str,
    directory: str | os.PathLike[str],
    state_dict: dict[str, Tensor] | None,
    save_embedding_layers: str | bool,
) -> None:
    """Writes one adapter to `directory`, or, unless it is called "default", to a sub-folder of its name."""
    config = model.peft_config[adapter_name]
    layers = pissa_layers(model.base_model.model, adapter_name)
    # PEFT saves an embedding layer's own weight as soon as the layer is adapted; ours has not changed.
    if save_embedding_layers == "auto" and any(name.endswith(tuple(EMBEDDING_LAYER_NAMES)) for name in layers):
        save_embedding_layers = False
    state = get_peft_model_state_dict(
        model, state_dict=state_dict, adapter_name=adapter_name, save_embedding_layers=save_embedding_layers
    )
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    starts: dict[str, Tensor] = {}
    for name, layer in layers.items():
        keys = [f"{PREFIX}{name}.{key}" for key in layer.factor_keys]
        da, db = layer.as_matrices(*(state[key].detach().float().cpu() for key in keys))
        start, base = layer.start_of(adapter_name), layer.unmerged_base
        a, b = torch.cat([start.a0.cpu() + da, da]), torch.cat([db, start.b0.cpu()], dim=1)
        factors[name] = layer.as_parameters(a, b)
        starts[f"{name}.a0"] = start.a0.cpu()
        if isinstance(base, StoredLinear) and base.start is not start:
            starts[f"{name}.base.a0"] = base.start.a0.cpu()
            starts[f"{name}.base.b0"] = base.start.b0.cpu()
    others = {
        key: value.detach().cpu().contiguous().clone()  # safetensors refuses tensors that share memory
        for key, value in state.items()
        if key.endswith(".bias") or not key.startswith(tuple(f"{PREFIX}{name}." for name in layers))
    }
    experts = _adapted_experts(model, layers)
    lora = _as_peft_has_it(factors, layers, experts)
    record = {
        "format": FORMAT,
        "pissa_version": pissa.__version__,
        "config": _config_as_json(config),
        "layers": {name: LayerRecord.of(layer, adapter_name).as_json() for name, layer in layers.items()},
        "experts": {path: {"count": count, "weights": weights} for path, (count, weights) in experts.items()},
    }
    folder = Path(directory) / ("" if adapter_name == "default" else adapter_name)
    with Staged(folder) as staged:
        staged.path(PISSA_RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
        save_file(starts, staged.path(PISSA_WEIGHTS), metadata={"format": "pt"})
        lora_config = _lora_config(config, adapter_name, layers, experts)
        staged.path(ADAPTER_CONFIG).write_text(_lora_config_text(model, lora_config))
        # Renamed last: an adapter that is there is complete.
        save_file(lora | others, staged.path(ADAPTER_WEIGHTS), metadata={"format": "pt"})


def _adapted_experts(model: PissaModel, layers: dict[str, PissaLayer]) -> dict[str, tuple[int, list[str]]]:
    """The experts modules that have adapters: how many experts, and which of their weights."""
    found = {
        path: (len(module), adapted_names(path, module, layers))
        for path, module in unfused_experts(model.base_model.model).items()
    }
    return {path: (count, names) for path, (count, names) in found.items() if names}


def _as_peft_has_it(
    factors: dict[str, tuple[Tensor, Tensor]], layers: dict[str, PissaLayer], experts: dict[str, tuple[int, list[str]]]
) -> dict[str, Tensor]:
    """The factors of all layers under PEFT's names, those of experts stacked."""
    rest = dict(factors)
    tensors: dict[str, Tensor] = {}
    for path, (count, names) in experts.items():
        for name, place in places(path, names).items():
            a, b = stack([rest.pop(f"{path}.{index}.{name}") for index in range(count)])
            tensors |= {f"{PREFIX}{place}.lora_A.weight": a, f"{PREFIX}{place}.lora_B.weight": b}
    for name, pair in rest.items():
        keys = [f"{PREFIX}{name}.{key}" for key in layers[name].factor_keys]
        tensors |= dict(zip(keys, (tensor.contiguous() for tensor in pair), strict=True))
    return tensors


# Names of layers that PEFT takes for former names of fused experts' weights in a list of target modules. It finds the
# layers all the same where their weights are listed as target parameters.
_TAKEN_FOR_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def _lora_config(
    config: PissaConfig,
    adapter_name: str,
    layers: dict[str, PissaLayer],
    experts: dict[str, tuple[int, list[str]]],
) -> LoraConfig:
    """The configuration of the plain LoRA in adapter_model.safetensors."""
    lora = config.as_lora()
    lora.fan_in_fan_out = any(isinstance(layer.unmerged_base, Conv1D) for layer in layers.values())
    if not experts:
        return lora
    targets = {name: name for name in layers if not name.startswith(tuple(f"{path}." for path in experts))}
    aside = {name for name in targets if name.rpartition(".")[2] in _TAKEN_FOR_EXPERTS}
    parameters = {f"{name}.weight": name for name in aside}
    parameters |= {f"{path}.{name}": f"{path}.0.{name}" for path, (_, names) in experts.items() for name in names}
    lora.target_modules, lora.target_parameters = sorted(targets.keys() - aside), sorted(parameters)
    lora.exclude_modules = lora.layers_to_transform = lora.layers_pattern = None
    lora.lora_dropout = 0.0  # which PEFT has not for parameters
    lora.rank_pattern, lora.alpha_pattern = {}, {}
    grow = lora.lora_alpha / config.lora_alpha
    for target, name in {**{name: name for name in targets.keys() - aside}, **parameters}.items():
        layer = layers[name]
        if layer.r[adapter_name] != config.r:
            lora.rank_pattern[re.escape(target)] = 2 * layer.r[adapter_name]
        if layer.lora_alpha[adapter_name] != config.lora_alpha:
            lora.alpha_pattern[re.escape(target)] = grow * layer.lora_alpha[adapter_name]
    return lora


def save_card(model: PissaModel, directory: str | os.PathLike[str]) -> None:
    """Writes or updates the model card, README.md, as PEFT does."""
    with tempfile.TemporaryDirectory() as scratch, Staged(directory) as staged:
        card = Path(scratch, "README.md")
        if (existing := Path(directory, "README.md")).is_file():
            card.write_bytes(existing.read_bytes())
        model.create_or_update_model_card(scratch)
        staged.path("README.md").write_bytes(card.read_bytes())


def warn_of_quantised_base(model: PissaModel) -> None:
    """Says, once for each model, where the plain LoRA is not the function that was trained."""
    forms = {
        module.form.residual
        for module in model.modules()
        if isinstance(module, StoredLinear)
        and not (module.form.residual == "explicit" and module.dtype == torch.float32)
    }
    if forms and not model.warned_of_quantised_base:
        model.warned_of_quantised_base = True
        warnings.warn(
            f"The residual of the base is stored as {' and '.join(sorted(forms))}. {ADAPTER_WEIGHTS} is a "
            "LoRA adapter for the unmodified base, which lacks the error of that storage, so there it is "
            "only approximately the function that was trained: Quant(W_res) + BA != W + (BA - B0 A0). "
            "PissaModel.from_pretrained restores the trained function exactly.",
            UserWarning,
            stacklevel=3,
        )


def _config_as_json(config: PissaConfig) -> dict[str, Any]:
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    del fields["runtime_config"]
    return {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}


def _lora_config_text(model: PissaModel, lora: LoraConfig) -> str:
    """adapter_config.json as PEFT itself writes it for the plain LoRA."""
    auto_mapping = None
    if lora.task_type is None:
        base_class = type(model.base_model.model)
        auto_mapping = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    with tempfile.TemporaryDirectory() as scratch:
        lora.save_pretrained(scratch, auto_mapping_dict=auto_mapping)
        return Path(scratch, ADAPTER_CONFIG).read_text()
