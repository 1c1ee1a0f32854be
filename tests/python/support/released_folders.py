"""Small checkpoints in the bytes in which large models are released, for tests: each weight packed by `ops.quantize`,
whose bytes are the libraries' (ops/test_ops_released.py), or in tiles of FP8, under the names of its layout."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import checkpoint_folders
import mixtures
from mapped_files import read_tensors
from pissa import ops

METHODS = {
    "mxfp4-compressed": "compressed-tensors",
    "nvfp4-compressed": "compressed-tensors",
    "nvfp4-modelopt": "modelopt",
    "int4-compressed": "compressed-tensors",
    "fp8-compressed": "compressed-tensors",
    "fp8-tiles": "fp8",
    "fp8-tensor": "fp8",
    "mxfp4-deepseek": "fp8",
    "mxfp4-gpt-oss": "mxfp4",
}
"""What config.json calls each layout."""


def packed(layout: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a weight [out, in] in that layout, by their names there; and what they are, in bfloat16."""
    rows, columns = weight.shape
    if layout == "fp8-tiles":
        return _tiles(weight.float())
    if layout == "fp8-tensor":
        scale = weight.float().abs().max() / 448
        codes = (weight.float() / scale).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale_inv": scale}, (codes.float() * scale).bfloat16()
    format = layout.partition("-")[0]
    found = ops.quantize(weight.float(), format, blocksize=32 if format == "int4" else None)
    dense = ops.dequantize(found, torch.bfloat16)
    codes, scales = found.codes.view(rows, -1), found.absmax.view(rows, -1)
    if layout == "mxfp4-gpt-oss":
        return {"blocks": codes.view(rows, -1, 16), "scales": scales}, dense
    if layout == "mxfp4-deepseek":
        return {"weight": codes.view(torch.int8), "scale": scales.view(torch.float8_e8m0fnu)}, dense
    if format == "fp8":
        return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scales}, dense
    if format == "int4":
        shape = torch.tensor([rows, columns])
        return {"weight_packed": codes.view(torch.int32), "weight_scale": scales, "weight_shape": shape}, dense
    if format == "mxfp4":
        return {"weight_packed": codes, "weight_scale": scales}, dense
    assert found.nested_absmax is not None
    scale = 1 / found.nested_absmax[0x38].reshape(1)  # of 1
    e4m3 = scales.view(torch.float8_e4m3fn)
    if layout == "nvfp4-modelopt":
        table = (e4m3.float() * (1 / scale)).repeat_interleave(16, 1)
        levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()
        values = levels[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
        parts = {"weight": codes, "weight_scale": e4m3, "weight_scale_2": (1 / scale).reshape(())}
        return parts, (values * table).bfloat16()
    return {"weight_packed": codes, "weight_scale": e4m3, "weight_global_scale": scale}, dense


def _tiles(weight: Tensor, side: int = 128) -> tuple[dict[str, Tensor], Tensor]:
    rows, columns = weight.shape
    scale = torch.empty(-(-rows // side), -(-columns // side))
    for i in range(len(scale)):
        for j in range(scale.shape[1]):
            tile = weight[i * side : (i + 1) * side, j * side : (j + 1) * side]
            scale[i, j] = tile.abs().max() / 448
    wide = scale.repeat_interleave(side, 0)[:rows].repeat_interleave(side, 1)[:, :columns]
    codes = (weight / wide).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}, (codes.float() * wide).bfloat16()


_LINEAR = re.compile(r"(_proj|_with_mqa|_qkv|\.w[123]|\.wq_[ab]|\.wkv|\.wo_[ab])\.weight$")
_STAYS = re.compile(r"^(vision|mm_)|indexer|compressor|kv_b_proj")


def release(model: nn.Module, layout: str | None, folder: Path, experts: str | None = None) -> nn.Module:
    """Writes a model in bfloat16, under the names of its checkpoints, with its linear layers in that layout, or dense,
    and its experts in their own, if it is another. Returns the model of the weights that these are."""
    model.bfloat16().save_pretrained(folder)
    state, dense = {}, {}
    for name, tensor in read_tensors(folder / "model.safetensors").items():
        # transformers writes Kimi's blocks of language under the name of those of vision.
        name = name.replace("language_model.model.blocks", "language_model.model.layers")
        own = experts or layout if ".experts." in name else layout
        if own == "mxfp4-gpt-oss":
            if tensor.dim() == 3:
                each = [packed(own, weight.mT) for weight in tensor]
                state |= {f"{name}_{local}": torch.stack([one[0][local] for one in each]) for local in each[0][0]}
                tensor = torch.stack([decoded.mT for _, decoded in each])
            else:
                state[name] = tensor
        elif own and _LINEAR.search(name) and not _STAYS.search(name):
            parts, tensor = packed(own, tensor)
            state |= {f"{name.removesuffix('.weight')}.{local}": part for local, part in parts.items()}
        else:
            state[name] = tensor
        dense[name] = tensor
    twin = folder.with_name(f"{folder.name}-dense")
    shutil.copytree(folder, twin)
    for path, tensors in {twin: dense, folder: state}.items():
        whole = {name: part.contiguous() for name, part in tensors.items()}
        save_file(whole, path / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": METHODS[layout or str(experts)]}
    (folder / "config.json").write_text(json.dumps(config))
    found: nn.Module = type(model).from_pretrained(twin)  # type: ignore[attr-defined]
    return found


# ---- Models ----------------------------------------------------------------------------------------------------------

DENSE_LAYOUTS = [layout for layout in METHODS if layout != "mxfp4-gpt-oss"]
FIELDS: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SIZES = {"hidden_size": 64, "intermediate_size": 192, "moe_intermediate_size": 64}


def gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    routed = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    sizes = mixtures.SIZES | SIZES
    return GptOssForCausalLM(GptOssConfig(**{**sizes, **mixtures.HEADS, **routed}))


def qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    routed = {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**mixtures.SIZES, **mixtures.HEADS, **routed, **SIZES}))


def released(kind: str, layout: str, folder: Path) -> nn.Module:
    """The model of the weights that the folder has, in float32, so that products are compared alone."""
    torch.manual_seed(0)
    makers = {"gpt_oss": gpt_oss, "qwen3_moe": qwen3_moe, "llama": lambda: checkpoint_folders.llama(**SIZES)}
    return release(makers[kind](), layout, folder).float().eval()
