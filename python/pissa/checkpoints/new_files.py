"""The files of a checkpoint that holds residuals: what is in each, and the small ones whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pissa import ops
from pissa.base.bitsandbytes_state import entry_layout, to_bitsandbytes
from pissa.base.start import StartFactors
from pissa.checkpoints.plan import Plan, PlannedLayer
from pissa.checkpoints.planned_file import Layout
from pissa.checkpoints.source import INDEX
from pissa.config import PissaConfig
from pissa.conversion.lora_start import INITIAL_FOLDER
from pissa.files.peft_layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pissa.files.pissa_layout import PISSA_RECORD, PISSA_WEIGHTS, TAKEN

INITIAL_WEIGHTS = f"{INITIAL_FOLDER}/{ADAPTER_WEIGHTS}"
INITIAL_CONFIG = f"{INITIAL_FOLDER}/{ADAPTER_CONFIG}"

_METADATA = {"format": "pt"}

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
"""The endings of what holds, or lists, the weights of a model."""

Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def layouts(plan: Plan) -> dict[str, Layout]:
    """All safetensors files. A tensor stays in the file of its name; the entries of a quantised one are in that of its
    first part."""
    files: dict[str, Tensors] = {path.name: {} for path in plan.source.paths}
    first = {layer.parts[0]: layer for layer in plan.layers.values() if is_quantised(layer)}
    gone = {name for layer in first.values() for name in layer.tensors}
    for layer in first.values():
        shard = files[plan.source.entry(layer.tensors[0]).path.name]
        shard |= {
            f"{layer.target}.{name}": found
            for name, found in entry_layout(layer.form, layer.shape, layer.dtype).items()
        }
    for name in plan.source.names:
        if name not in gone:
            entry = plan.source.entry(name)
            files[entry.path.name][name] = (entry.dtype, tuple(entry.shape))
    found = {name: Layout(tensors, _METADATA) for name, tensors in files.items()}
    found[INITIAL_WEIGHTS] = Layout(_factor_tensors(plan), _METADATA)
    alternated = [layer for layer in plan.layers.values() if has_taken(plan.config_of(layer))]
    if alternated:
        shapes = {name: shape for layer in alternated for name, shape in _taken_shapes(layer).items()}
        found[PISSA_WEIGHTS] = Layout({name: (torch.float32, shape) for name, shape in shapes.items()}, _METADATA)
    return found


def has_taken(config: PissaConfig) -> bool:
    """Whether residuals may lack other factors than those of the start."""
    return config.quant_iters > 1


def _taken_shapes(layer: PlannedLayer) -> dict[str, tuple[int, int]]:
    (rows, columns), r = layer.shape, layer.origin.r
    return {f"{layer.name}.{TAKEN[0]}": (r, columns), f"{layer.name}.{TAKEN[1]}": (rows, r)}


def taken_tensors(layer: PlannedLayer, start: StartFactors) -> dict[str, Tensor]:
    """The factors that the residual lacks, which have the rank of the start: zeros fill them up."""
    a, b = (start.a0, start.b0) if start.taken is None else start.taken
    missing = layer.origin.r - len(a)
    pair = functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing))
    return dict(zip(_taken_shapes(layer), pair, strict=True))


def _factor_tensors(plan: Plan) -> Tensors:
    return {
        name: (torch.float32, shape)
        for tensors in plan.factors
        for name, shape in tensors.shapes(plan.layers[tensors.layers[0]].origin.r).items()
    }


def is_quantised(layer: PlannedLayer) -> bool:
    """Whether the layer's residual is kept as codes."""
    return layer.form.kind != "explicit"


def residual_tensors(
    plan: Plan, layer: PlannedLayer, residual: Tensor | ops.QuantizedWeight
) -> Iterator[tuple[str, str, Tensor, int | None]]:
    """What is written of a residual: the file, the tensor's name, the values, and, of a part of a stack, its number."""
    if isinstance(residual, ops.QuantizedWeight):
        file = plan.source.entry(layer.tensors[0]).path.name
        for name, values in to_bitsandbytes(residual, layer.dtype).items():
            yield file, f"{layer.target}.{name}", values, None
        return
    row = 0
    for part in layer.parts:
        entry = plan.source.entry(part.tensor)
        shape = entry.shape if part.member is None else entry.shape[1:]
        rows = residual[row : row + shape[1 if part.transposed else 0]]
        row += len(rows)
        values = rows.mT if part.transposed else rows
        yield entry.path.name, part.tensor, values if part.member is None else values[None], part.member


def index_text(plan: Plan, files: dict[str, Layout]) -> str | None:
    """The index of the new shards, if the checkpoint has one."""
    if plan.source.index is None:
        return None
    shards = {name: layout for name, layout in files.items() if name not in (INITIAL_WEIGHTS, PISSA_WEIGHTS)}
    size = sum(layout.size - len(layout.header) for layout in shards.values())
    places = {tensor: name for name, layout in shards.items() for tensor in layout.names}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(index, indent=2) + "\n"


def config_text(plan: Plan) -> str:
    """config.json; with what transformers has to know of quantised layers."""
    text = (plan.source.folder / "config.json").read_text()
    quantised = [layer for layer in plan.layers.values() if is_quantised(layer)]
    if not quantised:
        return text
    config = json.loads(text)
    config["quantization_config"] = _quantization_config(plan, quantised[0])
    return json.dumps(config, indent=2) + "\n"


def _quantization_config(plan: Plan, layer: PlannedLayer) -> dict[str, Any]:
    """`BitsAndBytesConfig` as JSON, written without importing bitsandbytes. With experts in 4 bits, which transformers
    would take for missing and draw at random, the method is one that it does not know, so that it loads nothing."""
    in_4_bits = layer.form.kind == "nf4"
    half = layer.dtype if layer.dtype in (torch.bfloat16, torch.float16) else torch.float32
    method = {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": in_4_bits,
        "_load_in_8bit": not in_4_bits,
        "load_in_4bit": in_4_bits,
        "load_in_8bit": not in_4_bits,
    }
    return {
        **({"quant_method": "pissa"} if plan.has_quantised_experts else method),
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": plan.dense_linears,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_compute_dtype": str(half).removeprefix("torch."),
        "bnb_4bit_quant_type": "nf4" if in_4_bits else "fp4",
        "bnb_4bit_use_double_quant": bool(layer.form.double_quant),
        "bnb_4bit_quant_storage": "uint8",
    }


def small_files(folder: Path) -> list[Path]:
    """The files of a checkpoint beside its weights and its config.json: tokenizer, templates, card."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(_WEIGHTS)
        and path.name not in ("config.json", INDEX, PISSA_RECORD)
    ]
