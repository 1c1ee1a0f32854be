"""Weights in the byte layouts in which models are released, as bases that stay unchanged.

The layout of such a weight, in a file or a module, is recognised by the names, dtypes and shapes of its tensors:

    mxfp4   weight_packed uint8 [out, in / 2], weight_scale uint8 [out, in / 32]     compressed-tensors
            weight int8 [out, in / 2], scale E8M0 [out, in / 32]                     DeepSeek-V4
            blocks uint8 [out, in / 32, 16], scales uint8 [out, in / 32]             gpt-oss
    nvfp4   weight_packed uint8 [out, in / 2], weight_scale E4M3 [out, in / 16],
            weight_global_scale float32 [1]                                          compressed-tensors
            weight uint8, weight_scale E4M3, weight_scale_2 float32 []               ModelOpt
    int4    weight_packed int32 [out, in / 8], weight_scale [out, in / group],
            weight_shape int64 [2]                                                   compressed-tensors
    fp8     weight E4M3 [out, in], weight_scale_inv, weight_scale or scale: one, one for each row, or one for each tile
            of 128 x 128 (DeepSeek-V3, transformers) or 1 x 32 (MXFP8)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pissa import ops
from pissa.base.weights import CodedLinear
from pissa.ops._quant import check_quantized, e4m3_values
from pissa.ops.formats import FORMATS

CODES = ("weight", "weight_packed", "blocks")
"""The names of a weight's codes; "weight" may also be a dense weight."""
SCALES = ("weight_scale", "weight_scale_inv", "scale", "scales")
"""The names of its scales."""
BESIDE = ("weight_global_scale", "weight_scale_2", "weight_shape")
"""The names of a weight's other parts."""
OF_INPUTS = ("input_scale", "input_global_scale", "activation_scale", "k_scale", "v_scale")
"""Tensors for kernels that also quantise activations; nothing here reads them."""
REFUSED = {
    "weight_zero_point": "its codes are not symmetric (weight_zero_point)",
    "pre_quant_scale": "its inputs are scaled (pre_quant_scale)",
    "weight_g_idx": "its columns are in another order (weight_g_idx)",
}

_NAMES = (*CODES, *SCALES, *BESIDE, *REFUSED)
_TILE, _MX_BLOCK, _NVFP4_BLOCK = 128, 32, 16
_E8M0 = (torch.uint8, torch.float8_e8m0fnu)


def is_code(name: str, dtype: torch.dtype) -> bool:
    """Whether a tensor with one of the names in `CODES` contains codes."""
    return name != "weight" or dtype in (torch.float8_e4m3fn, torch.int8, torch.uint8)


def released_weight(parts: Mapping[str, Tensor]) -> ops.QuantizedWeight:
    """Returns the weight [out, in] for tensors given by name, without copying codes.

    Raises:
        ValueError: the layout is not in the table above, tensors do not fit each other, or a scale is NaN. The text
            begins with the name of the tensor.
    """
    for name, why in REFUSED.items():
        if name in parts:
            raise ValueError(f"{why}, which is not read: use the model in 16 bits")
    codes_name = _find_only(parts, CODES, "codes")
    scale_name = _find_only(parts, SCALES, "scales")
    codes, scale = parts[codes_name], parts[scale_name]
    if codes.dim() != (3 if codes_name == "blocks" else 2):
        raise ValueError(f"{codes_name}: got {list(codes.shape)}; needed: a matrix [out, ...]")
    if codes.dtype == torch.float8_e4m3fn:
        return _fp8(codes, scale, scale_name)
    if codes_name == "weight_packed" and codes.dtype == torch.int32:
        return _int4(codes, scale, parts.get("weight_shape"))
    if codes_name == "blocks":
        if codes.shape[-1] != _MX_BLOCK // 2:
            raise ValueError(f"blocks: got {list(codes.shape)}; needed: [out, in / 32, 16]")
        codes = codes.flatten(1)
    if codes.dtype not in (torch.uint8, torch.int8):
        raise ValueError(f"{codes_name}: got {codes.dtype} {list(codes.shape)}; needed: bytes [out, in / 2]")
    if scale.dtype == torch.float8_e4m3fn:
        return _nvfp4(codes, scale, scale_name, parts)
    shape = (codes.shape[0], 2 * codes.shape[1])
    scales = _read_exponents(scale, scale_name)
    return _assemble(codes, scales, None, "mxfp4", shape, _MX_BLOCK, scale_name)


def _find_only(parts: Mapping[str, Tensor], names: Sequence[str], what: str) -> str:
    present = [name for name in names if name in parts]
    if len(present) != 1:
        raise ValueError(
            f"{' and '.join(present) or sorted(parts)}: needed are {what} under one name of {', '.join(names)}: the "
            "checkpoint is damaged, or of a layout that is not read"
        )
    return present[0]


def _read_exponents(scale: Tensor, name: str) -> Tensor:
    """E8M0 scales as bytes."""
    if scale.dtype not in _E8M0:
        raise ValueError(f"{name}: got {scale.dtype}; needed: uint8 or float8_e8m0fnu, powers of two")
    exponents = scale.view(torch.uint8)
    if exponents.numel() and int(exponents.max()) == 255:
        raise ValueError(f"{name}: a scale is NaN (255) [P077]")
    return exponents


def _check_finite(scale: Tensor, name: str) -> Tensor:
    if not torch.isfinite(scale.float()).all():
        raise ValueError(f"{name}: a scale is NaN or infinite")
    return scale


def _assemble(
    codes: Tensor,
    scales: Tensor,
    table: Tensor | None,
    format: str,
    shape: tuple[int, int],
    blocksize: int,
    name: str,
) -> ops.QuantizedWeight:
    """Returns the weight, after checking that the tensors fit each other and the format."""
    if format != "fp8" and shape[1] % blocksize:
        raise ValueError(f"{name}: rows of {shape[1]} elements are not a multiple of {blocksize}, which share a scale")
    flat = codes.reshape(-1).view(torch.uint8)
    weight = ops.QuantizedWeight(flat, scales.reshape(-1), table, None, format, shape, blocksize)
    needed = shape[0] * shape[1] // blocksize
    if format != "fp8" and scales.numel() != needed:
        raise ValueError(f"{name}: got {list(scales.shape)}; needed: [{shape[0]}, {shape[1] // blocksize}]")
    return check_quantized(weight)


def _nvfp4(codes: Tensor, scale: Tensor, name: str, parts: Mapping[str, Tensor]) -> ops.QuantizedWeight:
    divisor, factor = parts.get("weight_global_scale"), parts.get("weight_scale_2")
    numbers = [number for number in (divisor, factor) if number is not None]
    if len(numbers) != 1 or numbers[0].numel() != 1:
        raise ValueError(f"{name}: needed in addition: one of weight_global_scale and weight_scale_2, one number")
    values = e4m3_values(scale.device)
    # Computes a block's scale as each library does, in float32.
    table = values / divisor.float() if divisor is not None else values * factor.float()  # type: ignore[union-attr]
    scales = scale.view(torch.uint8)
    _check_finite(table[:127], "weight_scale_2" if divisor is None else "weight_global_scale")
    if scales.numel() and int((scales & 127).max()) == 127:
        raise ValueError(f"{name}: a scale is NaN")
    shape = (codes.shape[0], 2 * codes.shape[1])
    return _assemble(codes, scales, table, "nvfp4", shape, _NVFP4_BLOCK, name)


def _int4(codes: Tensor, scale: Tensor, shape: Tensor | None) -> ops.QuantizedWeight:
    rows, columns = codes.shape[0], 8 * codes.shape[1]
    declared = None if shape is None else tuple(shape.tolist())
    if declared not in (None, (rows, columns)):
        raise ValueError(
            f"weight_shape: got {list(declared or ())} beside weight_packed {list(codes.shape)}; needed: elements of 4 "
            "bits, 8 in a word"
        )
    if scale.dim() != 2 or scale.shape[0] != rows or not scale.shape[1] or columns % scale.shape[1]:
        raise ValueError(f"weight_scale: got {list(scale.shape)}; needed: [{rows}, {columns} / group]")
    group, allowed = columns // scale.shape[1], FORMATS["int4"].blocksizes
    if group not in allowed:
        raise ValueError(f"weight_scale: got a scale for {group} elements; allowed: {', '.join(map(str, allowed))}")
    scales = _check_finite(scale, "weight_scale")
    if scales.dtype != torch.bfloat16:  # float16 and float32, which it holds exactly
        scales = scales.float()
    return _assemble(codes, scales, None, "int4", (rows, columns), group, "weight_scale")


def _fp8(codes: Tensor, scale: Tensor, name: str) -> ops.QuantizedWeight:
    rows, columns = shape = (codes.shape[0], codes.shape[1])
    if not columns:
        raise ValueError(f"weight: got {list(shape)}; needed: at least one column")
    scales = _read_exponents(scale, name) if scale.dtype in _E8M0 else _check_finite(scale, name)
    if scales.dtype not in (torch.uint8, torch.bfloat16):
        scales = scales.float()
    if scales.numel() == 1:
        return _assemble(codes, scales.reshape(1).expand(rows).contiguous(), None, "fp8", shape, columns, name)
    across = scales.shape[1] if scales.dim() == 2 else 1
    for width, height in ((_TILE, _TILE), (columns, 1), (_MX_BLOCK, 1)):
        if (scales.shape[0], across) == (-(-rows // height), -(-columns // width)):
            return _assemble(codes, scales, None, "fp8", shape, width, name)
    raise ValueError(
        f"{name}: got {list(scale.shape)} beside a weight {list(shape)}; allowed: one scale, one for each row, or one "
        "for each tile of 128 x 128 or 1 x 32"
    )


def released_linear(module: nn.Module) -> CodedLinear | None:
    """The base of a linear module that holds released codes, as transformers and compressed-tensors store them; None if
    it holds none. Raises ValueError as `released_weight` does."""
    parts = {name: tensor for name in _NAMES if isinstance(tensor := getattr(module, name, None), Tensor)}
    has_codes = any(name in parts and is_code(name, parts[name].dtype) for name in CODES)
    if not isinstance(module, nn.Linear) or not has_codes or not any(name in parts for name in SCALES):
        return None
    if type(module).__name__ == "FP8GroupedLinear":  # several products in one module
        return None
    if "weight_packed" in parts:
        parts.pop("weight", None)
    base = CodedLinear(released_weight({name: tensor.detach() for name, tensor in parts.items()}), module.bias)
    base.train(module.training)
    return base


def join_rows(weights: Sequence[ops.QuantizedWeight]) -> ops.QuantizedWeight:
    """Stacks weights of one format by their rows. The result is a copy, unless there is only one.

    Raises:
        ValueError: the scales cannot be stored in one tensor.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    rows = sum(weight.shape[0] for weight in weights)
    layouts = {(weight.format, weight.shape[1], weight.blocksize, weight.absmax.dtype) for weight in weights}
    tables = [weight.nested_absmax for weight in weights if weight.nested_absmax is not None]
    heights = [_height(weight) for weight in weights]
    tiled = any(weight.shape[0] % height for weight, height in zip(weights[:-1], heights, strict=False))
    if len(layouts) > 1 or tiled or len(set(heights)) > 1:
        raise ValueError("weights of several formats, or whose tiles end inside, cannot be joined by their rows")
    codes, absmax = torch.cat([weight.codes for weight in weights]), torch.cat([weight.absmax for weight in weights])
    table = tables[0] if tables else None
    # Entry 1, because 127 is NaN: the smallest scale, in proportion to the global one.
    others = [number for number, table in enumerate(tables) if table[1] != tables[0][1]]
    if others:  # gate and up of an expert: scales are positive, so the second one's use the other half of the table
        second = tables[others[0]]
        if int(absmax.max()) > 127 or any(tables[number][1] != second[1] for number in others):
            raise ValueError("weights of several global scales, or of negative ones, cannot be joined by rows [P078]")
        absmax = torch.cat([weight.absmax | (number in others) << 7 for number, weight in enumerate(weights)])
        table = torch.cat([tables[0][:128], second[:128]])
    return first._replace(codes=codes, absmax=absmax, nested_absmax=table, shape=(rows, first.shape[1]))


def _height(weight: ops.QuantizedWeight) -> int:
    """Rows in a tile of FP8; 1 for other formats."""
    across = -(-weight.shape[1] // weight.blocksize)
    tiled = weight.format == "fp8" and weight.absmax.numel() != weight.shape[0] * across
    return weight.blocksize if tiled else 1
