"""An adapter on disk: a plain LoRA for every other runtime, and beside it what an exact restart needs.

    adapter_config.json         PEFT's, for a plain LoRA of rank 2r on the unmodified base
    adapter_model.safetensors   PEFT's: lora_A = [A ; dA], lora_B = [dB | B0]
    pissa.json                  the PissaConfig, and for each layer a fingerprint of its base
    pissa.safetensors           A0 (B0, dA and dB are above), and the factors of a stored base that are not
                                the adapter's own; with DoRA the norms of the base's rows; with AdaLoRA the
                                differences of singular values and vectors that dA is made of; of an output
                                layer that is kept as a residual and saved, the residual

Start factors are frozen, so the files of two saves of one run fit each other. That the upper half of lora_A
is A0 + dA to the bit shows that they do; checksums within each file, that it is as it was written.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from pissa.base.stored import StoredLinear, residual_tensors
from pissa.base.weights import whole
from pissa.distributed import check_whole
from pissa.files.plain_lora import PREFIX, lora_config
from pissa.files.record import AdapterRecord, LayerRecord
from pissa.files.staged import Staged
from pissa.files.tensor_file import write_tensors
from pissa.files.vocabulary import is_to_be_saved, vocabulary
from pissa.layers.convolution import PissaConvolution
from pissa.layers.layer import pissa_layers

if TYPE_CHECKING:
    from pissa.model.pissa_model import PissaModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PISSA_RECORD = "pissa.json"
PISSA_WEIGHTS = "pissa.safetensors"
CONFIG_FILES = (ADAPTER_CONFIG, PISSA_RECORD)
ADAPTER_FILES = (*CONFIG_FILES, ADAPTER_WEIGHTS, PISSA_WEIGHTS)


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
    with_vocabulary = is_to_be_saved(model, adapter_name, save_embedding_layers)
    check_whole(dict(model.named_parameters()) if state_dict is None else state_dict)
    state = model.state_dict() if state_dict is None else state_dict
    lora = get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter_name, save_embedding_layers=False)
    starts: dict[str, Tensor] = {}
    for name, layer in layers.items():
        start, base = layer.start_of(adapter_name), layer.unmerged_base
        starts[f"{name}.a0"] = start.a0
        if config.use_adalora:
            deltas = layer.deltas_in(state, f"{PREFIX}{name}.", adapter_name)
            starts |= {f"{name}.delta_a": deltas.a, f"{name}.delta_e": cast(Tensor, deltas.e)}
        if config.use_dora:
            starts[f"{name}.norm"] = layer.magnitude(adapter_name).base_lengths
        if isinstance(base, StoredLinear) and base.start is not start:
            starts |= {f"{name}.base.a0": base.start.a0, f"{name}.base.b0": base.start.b0}
    gathered = {name: (state_dict or {}).get(f"{PREFIX}{name}.base_layer.weight") for name in layers}
    if with_vocabulary:
        found = vocabulary(model, adapter_name)
        lora |= {key: tensor.value(state_dict or {}) for key, tensor in found.items()}
        stored = {id(tensor.module) for tensor in found.values() if tensor.is_stored}
        for name, layer in layers.items():
            if id(layer.unmerged_base) in stored:  # its dense weight cannot be had again
                parts = residual_tensors(whole(layer.unmerged_base, gathered[name]).residual)
                starts |= {f"{name}.base.{part}": tensor for part, tensor in parts.items()}
    records = {name: LayerRecord.of(layer, adapter_name, gathered[name]) for name, layer in layers.items()}
    record = AdapterRecord(config, records)
    folder = Path(directory) / ("" if adapter_name == "default" else adapter_name)
    with Staged(folder) as staged:
        staged.path(PISSA_RECORD).write_text(record.text())
        write_tensors(staged.path(PISSA_WEIGHTS), _on_cpu(starts))
        plain = lora_config(model.base_model.model, config, adapter_name, layers)
        staged.path(ADAPTER_CONFIG).write_text(_config_text(model, plain))
        # Renamed last: an adapter that is there is complete.
        write_tensors(staged.path(ADAPTER_WEIGHTS), _on_cpu(lora))


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous; copied where safetensors would refuse them for sharing memory."""
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        found[name] = value.clone() if storage in storages else value
        storages.add(storage)
    return found


def save_card(model: PissaModel, directory: str | os.PathLike[str]) -> None:
    """Writes or updates the model card, README.md, as PEFT does. One that cannot be updated is left as it is, with a
    warning: it must not cost the adapter."""
    existing = Path(directory, "README.md")
    with tempfile.TemporaryDirectory() as scratch:
        card = Path(scratch, "README.md")
        try:
            if os.path.isfile(existing):
                card.write_bytes(existing.read_bytes())
            elif os.path.lexists(existing):
                raise ValueError("it is not a regular file")
            model.create_or_update_model_card(scratch)
        except Exception as error:  # of the system's, of yaml's, of PEFT's
            warnings.warn(f"{existing} is left as it is, for it cannot be updated: {error}", UserWarning, stacklevel=3)
            return
        with Staged(directory) as staged:
            staged.path("README.md").write_bytes(card.read_bytes())


def warn_of_plain_lora(model: PissaModel) -> None:
    """Says, once for each model, where the plain LoRA is not the function that was trained."""
    if model.warned_of_plain_lora:
        return
    forms = {
        module.form.kind
        for module in model.modules()
        if isinstance(module, StoredLinear) and not (module.form.kind == "explicit" and module.dtype == torch.float32)
    }
    if forms:
        model.warned_of_plain_lora = True
        warnings.warn(
            f"The residual of the base is stored as {' and '.join(sorted(forms))}. {ADAPTER_WEIGHTS} is a "
            "LoRA adapter for the unmodified base, which lacks the error of that storage, so there it is "
            "only approximately the function that was trained: Quant(W_res) + BA != W + (BA - B0 A0). "
            "PissaModel.from_pretrained restores the trained function exactly.",
            UserWarning,
            stacklevel=3,
        )
    unlike_peft = [
        name
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, PissaConvolution) and not module.is_peft_compatible
    ]
    if unlike_peft:
        model.warned_of_plain_lora = True
        warnings.warn(
            f"Convolutions with a dilation or a padding_mode ({len(unlike_peft)}, {unlike_peft[0]} the first) lose it "
            f"in LoRA layers of PEFT 0.21: there {ADAPTER_WEIGHTS} is the function that was trained once the adapter "
            "is merged, with merge_and_unload, and not before.",
            UserWarning,
            stacklevel=3,
        )


def _config_text(model: PissaModel, config: LoraConfig) -> str:
    """adapter_config.json as PEFT itself writes it for the plain LoRA."""
    auto_mapping = None
    if config.task_type is None:
        base_class = type(model.base_model.model)
        auto_mapping = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch, auto_mapping_dict=auto_mapping)
        return Path(scratch, ADAPTER_CONFIG).read_text()
