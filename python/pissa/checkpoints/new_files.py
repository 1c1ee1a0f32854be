"""The files of a checkpoint that holds residuals: what is in each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pissa.base.start import StartFactors
from pissa.checkpoints.layer import new_shards
from pissa.checkpoints.plan import Plan, PlannedLayer
from pissa.config import Form, PissaConfig
from pissa.conversion.lora_start import INITIAL_FOLDER
from pissa.files.model_folder import CONFIG, read_config
from pissa.files.peft_layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pissa.files.pissa_layout import PISSA_WEIGHTS, TAKEN
from pissa.files.safetensors_header import Layout

INITIAL_WEIGHTS = f"{INITIAL_FOLDER}/{ADAPTER_WEIGHTS}"
INITIAL_CONFIG = f"{INITIAL_FOLDER}/{ADAPTER_CONFIG}"

_FLAGS = {"nf4": "load_in_4bit", "int8": "load_in_8bit"}
"""How each format is declared to transformers, in `BitsAndBytesConfig`."""


def layouts(plan: Plan) -> dict[str, Layout]:
    """All safetensors files."""
    found = new_shards(plan.source, [layer for layer in plan.layers.values() if layer.is_packed])
    found[INITIAL_WEIGHTS] = _float32(
        {
            name: shape
            for tensors in plan.factors
            for name, shape in tensors.shapes(plan.layers[tensors.layers[0]].origin.r).items()
        }
    )
    alternated = [layer for layer in plan.layers.values() if has_taken(plan.config_of(layer))]
    if alternated:
        found[PISSA_WEIGHTS] = _float32({k: shape for layer in alternated for k, shape in _taken_shapes(layer).items()})
    return found


def _float32(shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    return Layout({name: (torch.float32, shape) for name, shape in shapes.items()}, {"format": "pt"})


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


def config_text(plan: Plan) -> str:
    """config.json; with what transformers has to know of quantised layers."""
    quantised = [layer for layer in plan.layers.values() if layer.is_packed]
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
