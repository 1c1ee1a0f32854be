"""A folder as `pissa init` writes it, made of a model in memory that `pissa.wrap` has given its residuals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

import pissa
from pissa import ops
from pissa.base.bitsandbytes_state import to_bitsandbytes
from pissa.files.plain_lora import factors_of
from pissa.files.record import AdapterRecord, LayerRecord
from pissa.files.tensor_file import write_tensors
from pissa.layers.layer import pissa_layers

BITS = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "int8": {"load_in_8bit": True}}


def dense_model(source: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(source)


def split_folder(source: Path, target: Path, **fields: Any) -> Path:
    """Splits the linear layers of a dense model's folder, whose modules are called as its tensors are."""
    model = dense_model(source)
    state = dict(model.state_dict())
    wrapped = pissa.wrap(model, task_type="CAUSAL_LM", **fields)
    layers = pissa_layers(model)
    for name, layer in layers.items():
        residual = layer.base.residual
        if isinstance(residual, ops.QuantizedWeight):
            del state[f"{name}.weight"]
            entries = to_bitsandbytes(residual, model.dtype)
            state |= {f"{name}.{entry}": value for entry, value in entries.items()}
        else:
            state[f"{name}.weight"] = layer.base.as_weight(residual)
    target.mkdir()
    save_file(
        {name: value.contiguous() for name, value in state.items()}, target / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((source / "config.json").read_text())
    if quant := fields.get("quant"):
        config["quantization_config"] = {"quant_method": "bitsandbytes", **BITS[quant]}
    (target / "config.json").write_text(json.dumps(config))
    records = {name: LayerRecord.of(layer, "default") for name, layer in layers.items()}
    (target / "pissa.json").write_text(AdapterRecord(wrapped.peft_config["default"], records).text())
    factors: dict[str, torch.Tensor] = {}
    for part in factors_of(model, layers):
        starts = [layers[name].start_of("default") for name in part.layers]
        factors |= part.pack([(start.a0, start.b0) for start in starts])
    taken = {
        f"{name}.base.taken_{part}": factor
        for name, layer in layers.items()
        for part, factor in zip("ab", layer.base.start.taken or (), strict=False)
        if factor.numel()
    }
    if taken:
        write_tensors(target / "pissa.safetensors", taken)
    (target / "pissa_init").mkdir()
    write_tensors(target / "pissa_init" / "adapter_model.safetensors", factors)
    return target
