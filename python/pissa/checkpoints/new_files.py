"""The files of a checkpoint that holds residuals: what is in each, and the small ones whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.utils import CHAT_TEMPLATE_DIR

from pissa import ops
from pissa.base.bitsandbytes_state import entry_layout, to_bitsandbytes
from pissa.base.start import StartFactors
from pissa.checkpoints.output import Output
from pissa.checkpoints.plan import Plan, PlannedLayer
from pissa.config import Form, PissaConfig
from pissa.conversion.lora_start import INITIAL_FOLDER
from pissa.files.model_folder import CONFIG, parts_of, read_config
from pissa.files.peft_layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pissa.files.pissa_layout import PISSA_RECORD, PISSA_WEIGHTS, TAKEN
from pissa.files.safetensors_header import Layout
from pissa.files.source import INDEX, Source

INITIAL_WEIGHTS = f"{INITIAL_FOLDER}/{ADAPTER_WEIGHTS}"
INITIAL_CONFIG = f"{INITIAL_FOLDER}/{ADAPTER_CONFIG}"

_METADATA = {"format": "pt"}

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
"""The endings of what holds, or lists, the weights of a model."""

_FLAGS = {"nf4": "load_in_4bit", "int8": "load_in_8bit"}
"""How each format is declared to transformers, in `BitsAndBytesConfig`."""

_FOLDERS = (CHAT_TEMPLATE_DIR, "*_tokenizer")
"""What transformers makes folders of: named chat templates, and the further tokenizers of a processor. Any other folder
is somebody else's: .git and .cache, original/ with the weights of another program, checkpoints of a training."""

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
    a, b = start.lacked
    missing = layer.origin.r - len(a)
    pair = functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing))
    return dict(zip(_taken_shapes(layer), pair, strict=True))


def start_tensors(start: StartFactors) -> list[Tensor]:
    """The tensors of a start of which the record has the fingerprint: the factors, and those taken, if they are
    others."""
    taken = start.taken if start.rank_taken else None
    return [start.a0, start.b0, *(taken or ())]


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
    for name, values, member in parts_of(residual, layer.parts, plan.source):
        yield plan.source.entry(name).path.name, name, values, member


def index_text(source: Source, files: Mapping[str, Layout]) -> str | None:
    """The index of the new shards, if the checkpoint has one."""
    if source.index is None:
        return None
    shards = {name: layout for name, layout in files.items() if name not in (INITIAL_WEIGHTS, PISSA_WEIGHTS)}
    size = sum(layout.size - len(layout.header) for layout in shards.values())
    places = {tensor: name for name, layout in shards.items() for tensor in layout.names}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(index, indent=2) + "\n"


def config_text(plan: Plan) -> str:
    """config.json; with what transformers has to know of quantised layers."""
    quantised = [layer for layer in plan.layers.values() if is_quantised(layer)]
    if not quantised:
        return (plan.source.folder / CONFIG).read_text(encoding="utf-8")
    config = read_config(plan.source.folder)
    config["quantization_config"] = quantization_config(
        quantised[0].form, quantised[0].dtype, plan.dense_linears, experts=plan.has_quantised_experts
    )
    return json.dumps(config, indent=2) + "\n"


def quantization_config(
    form: Form, dtype: torch.dtype, dense_linears: Sequence[str], *, experts: bool = False
) -> dict[str, Any]:
    """`BitsAndBytesConfig` as JSON, written without importing bitsandbytes. With experts in 4 bits, which transformers
    would take for missing and draw at random, the method is one that it does not know, so that it loads nothing.

    Args:
        form: of the quantised layers.
        dtype: of their weights before.
        dense_linears: the linear layers that are not quantised.
        experts: whether fused experts are.
    """
    flag = _FLAGS[form.kind]
    half = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
    flags = {f"{hidden}{name}": name == flag for hidden in ("_", "") for name in _FLAGS.values()}
    return {
        **({"quant_method": "pissa"} if experts else {"quant_method": "bitsandbytes", **flags}),
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": list(dense_linears),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_compute_dtype": str(half).removeprefix("torch."),
        "bnb_4bit_quant_type": form.kind if flag == "load_in_4bit" else "fp4",
        "bnb_4bit_use_double_quant": bool(form.double_quant),
        "bnb_4bit_quant_storage": "uint8",
    }


def copy_small_files(folder: Path, out: Output) -> None:
    """Copies the files of a checkpoint beside its weights and its config.json: tokenizer, templates, card."""
    paths = [path for path in folder.iterdir() if path.name not in ("config.json", INDEX, PISSA_RECORD)]
    paths += [path for name in _FOLDERS for path in folder.glob(f"{name}/**/*")]
    for path in paths:
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, out.path(path.relative_to(folder).as_posix()))
