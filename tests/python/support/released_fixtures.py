"""Writes fixtures/released.safetensors: weights as the libraries that release them pack them, with what the same
libraries make of them again. Run by hand, where compressed-tensors, nvidia-modelopt and transformers are installed:

    python tests/python/support/released_fixtures.py

Each layout has its tensors under its name, "decoded" (bfloat16), and, of compressed-tensors, "dense",
which was packed. The last rows of codes are every byte, under every scale that the layout has where there is room.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

PATH = Path(__file__).parents[1] / "fixtures" / "released.safetensors"
ROWS, COLUMNS = 32, 256


def read(layout: str) -> dict[str, Tensor]:
    """The tensors of a layout, by their names in it."""
    with safe_open(PATH, "pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{layout}/")]  # noqa: SIM118
        return {name.removeprefix(f"{layout}/"): file.get_tensor(name) for name in names}


def weight() -> Tensor:
    """Rows of different sizes."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(ROWS, COLUMNS, generator=generator)
    return values * torch.logspace(-3, 2, ROWS)[:, None]


def every_byte(codes: Tensor) -> Tensor:
    """The codes with every byte in the last rows."""
    codes = codes.clone()
    flat = codes.view(torch.uint8).flatten(1)
    flat[-16:] = torch.arange(256, dtype=torch.uint8).repeat(-(-flat.shape[1] // 256))[: flat.shape[1]]
    return codes


def compressed(layout: str, args: dict[str, Any], group: int, scales: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """As compressed-tensors packs a weight; `scales` take the place of the first of the last rows."""
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

    kind = {"mxfp4": MXFP4PackedCompressor, "nvfp4": NVFP4PackedCompressor}.get(layout, PackedQuantizationCompressor)
    dense = weight().to(dtype)
    blocks = dense.view(ROWS, -1, group)
    of_weights = QuantizationArgs(symmetric=True, group_size=group, **args)
    whole = generate_gparam(dense.amin(), dense.amax()) if layout == "nvfp4" else None
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), of_weights, global_scale=whole)
    scheme = QuantizationScheme(targets=["Linear"], weights=of_weights)
    state = {"weight": dense, "weight_scale": scale.float() if layout == "mxfp4" else scale}
    if whole is not None:
        state["weight_global_scale"] = whole
    packed = kind.compress(state, scheme)
    packed["weight_packed"] = every_byte(packed["weight_packed"])
    packed["weight_scale"][-16:] = scales.repeat(16 * COLUMNS)[: 16 * COLUMNS // group].view(16, -1)
    decoded = kind.decompress(dict(packed), scheme)["weight"]
    return {**packed, "dense": dense, "decoded": decoded.bfloat16()}


def modelopt() -> dict[str, Tensor]:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    packed, scale, double = NVFP4QTensor.quantize(weight(), 16)
    packed._quantized_data = every_byte(packed._quantized_data)
    decoded = packed.dequantize(dtype=torch.float32, scale=scale, double_scale=double, block_sizes={-1: 16})
    tensors = {"weight": packed._quantized_data, "weight_scale": scale, "weight_scale_2": double}
    return {**tensors, "decoded": decoded.bfloat16()}


def gpt_oss() -> dict[str, Tensor]:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = every_byte(torch.zeros(ROWS, COLUMNS // 32, 16, dtype=torch.uint8))[None]
    blocks[0, :16] = torch.randint(0, 256, (16, COLUMNS // 32, 16), generator=torch.Generator().manual_seed(1))
    scales = torch.arange(64, 192, dtype=torch.uint8).repeat(2).view(1, ROWS, COLUMNS // 32)
    decoded = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    return {"blocks": blocks[0], "scales": scales[0], "decoded": decoded[0].mT.contiguous()}


def fine_grained(rows: int, columns: int, scale: Tensor) -> dict[str, Tensor]:
    """As transformers decodes FP8 with those scales."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes = torch.arange(256, dtype=torch.uint8).repeat(rows * columns // 256 + 1)[: rows * columns]
    codes[codes % 128 == 127] = 0  # NaN
    codes = codes.view(rows, columns).view(torch.float8_e4m3fn)
    decoded = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16)
    return {"weight": codes, "weight_scale_inv": scale, "decoded": decoded}


def main() -> None:
    fp4 = {"num_bits": 4, "type": "float", "scale_dtype": torch.uint8, "strategy": "group"}
    nvfp4 = fp4 | {"scale_dtype": torch.float8_e4m3fn, "strategy": "tensor_group"}
    int4 = {"num_bits": 4, "type": "int", "strategy": "group"}
    exponents = torch.arange(64, 192, dtype=torch.uint8)
    e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    generator = torch.Generator().manual_seed(2)
    halves = torch.rand(512, generator=generator).bfloat16()
    v4_scales = torch.arange(100, 140, dtype=torch.uint8).repeat(20)[: ROWS * 8].view(ROWS, 8)
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    v4 = torch.arange(256, dtype=torch.uint8).repeat(ROWS // 2).view(ROWS, 128).view(torch.int8)
    layouts = {
        "mxfp4-compressed": compressed("mxfp4", fp4, 32, exponents, torch.float32),
        "nvfp4-compressed": compressed("nvfp4", nvfp4, 16, e4m3, torch.float32),
        "int4-compressed-32": compressed("int4", int4, 32, halves, torch.bfloat16),
        "int4-compressed-128": compressed("int4", int4, 128, halves, torch.bfloat16),
        "nvfp4-modelopt": modelopt(),
        "mxfp4-gpt-oss": gpt_oss(),
        "mxfp4-deepseek": {
            "weight": v4,
            "scale": v4_scales.view(torch.float8_e8m0fnu),
            "decoded": Fp8Dequantize(None)._dequantize_one(v4, v4_scales, torch.bfloat16),
        },
        "fp8-tiles": fine_grained(256, 128, torch.rand(2, 1, generator=generator)),
        "fp8-tiles-bf16": fine_grained(256, 128, torch.rand(2, 1, generator=generator).bfloat16()),
        "fp8-tensor": fine_grained(96, 160, torch.rand((), generator=generator)),
        "fp8-rows": fine_grained(96, 160, torch.rand(96, 1, generator=generator)),
        "fp8-mx": fine_grained(64, 256, torch.arange(100, 140, dtype=torch.uint8).repeat(13)[: 64 * 8].view(64, 8)),
    }
    named = {f"{layout}/{name}": part for layout, parts in layouts.items() for name, part in parts.items()}
    save_file({name: tensor.contiguous() for name, tensor in named.items()}, PATH)


if __name__ == "__main__":
    main()
