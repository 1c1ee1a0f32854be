"""Small checkpoints in the bytes in which large models are released, for tests: each weight packed by `ops.quantize`,
whose bytes are the libraries' (ops/test_ops_released.py), or in tiles of FP8, under the names of its layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

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


def release(model: nn.Module, layout: str, folder: Path) -> None:
    """Writes a bfloat16 model with the weights of its linear layers and experts in that layout, and gives the model the
    weights that they are. Experts are written one by one, of gpt-oss together."""
    model.bfloat16()
    state: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 3 and ".experts." in name:
            _release_experts(name, tensor, layout, state, dense)
        elif name.endswith("_proj.weight") and layout != "mxfp4-gpt-oss":
            parts, dense[name] = packed(layout, tensor)
            state |= {f"{name.removesuffix('.weight')}.{local}": part for local, part in parts.items()}
        else:
            state[name] = dense[name] = tensor
    model.load_state_dict(dense)
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    config["quantization_config"] = {"quant_method": METHODS[layout]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: part.contiguous() for name, part in state.items()}, folder / "model.safetensors")


def _release_experts(name: str, stack: Tensor, layout: str, state: dict[str, Tensor], dense: dict[str, Tensor]) -> None:
    transposed = layout == "mxfp4-gpt-oss"
    each = []
    stacks: dict[str, list[Tensor]] = {}
    for index, weight in enumerate(stack):
        if transposed:
            parts, decoded = packed(layout, weight.mT)
            for local, part in parts.items():
                stacks.setdefault(f"{name}_{local}", []).append(part)
            each.append(decoded.mT)
            continue
        path, _, leaf = name.rpartition(".")
        halves = {"gate_proj": weight.chunk(2)[0], "up_proj": weight.chunk(2)[1]}
        rows = []
        for own, half in (halves if leaf == "gate_up_proj" else {leaf: weight}).items():
            parts, decoded = packed(layout, half)
            state |= {f"{path}.{index}.{own}.{local}": part for local, part in parts.items()}
            rows.append(decoded)
        each.append(torch.cat(rows))
    state |= {key: torch.stack(parts) for key, parts in stacks.items()}
    dense[name] = torch.stack(each)
