"""Quantised weights: conversion to codes and scales, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pissa.ops import _autograd  # noqa: F401  registers fakes and gradients
from pissa.ops._second_moment import check_moments, feedback_factors
from pissa.ops.checks import FLOATS, check_choice, check_devices, check_finite, check_matrix, check_tensor
from pissa.ops.formats import DEFAULT, FORMATS, QuantFormat

_OPS = torch.ops.pissa

SCALES = (torch.float32, torch.bfloat16, torch.uint8)
"""The dtypes that scales may have."""


class QuantizedWeight(NamedTuple):
    """A weight [out, in] as codes and scales, byte for byte as the libraries that use the format store them.

    "nf4", 4-bit NormalFloat (QLoRA, arXiv 2305.14314): blocks of `blocksize` elements run over the flattened weight and
    may cross rows. `codes`: uint8 [ceil(out * in / 2)], with the first of two elements in the high nibble. `absmax`:
    float32 [blocks]; or, with double quantisation, uint8 [blocks] together with `nested_absmax` float32 [ceil(blocks /
    256)] and `offset` float32 []. At the default block size 64 it takes 4.5 bits per weight, or 4.127 nested.

    "int8" (LLM.int8(), arXiv 2208.07339): a block is a row. `codes`: uint8 [out * in], the bytes of bitsandbytes' int8
    `CB`. `absmax`: float32 [out], its `SCB`, the largest absolute value of each row. An element is code * absmax / 127.
    It takes 8 bits per weight, plus 32 per row.

    "nf3" and "nf2": NormalFloats of 3 and 2 bits with NF4's blocks and scales, in a byte layout of our own. `codes` are
    packed in order, starting at the lowest bit of the first byte (cpp/pissa/core/normal_float.h). They take 3.127 and
    2.127 bits per weight, nested, at block size 64.

    Formats of released models. Their elements are codes times scales, rounded once:

    "mxfp4" (OCP Microscaling Formats 1.0; gpt-oss, compressed-tensors): `codes`: uint8 [out * in / 2], E2M1, with the
    first of two elements in the low nibble. `absmax`: uint8 [out * in / 32], E8M0, 2^(byte - 127). 4.25 bits per
    weight.

    "nvfp4" (compressed-tensors, ModelOpt): `codes` as in mxfp4; `absmax`: uint8 [out * in / 16], bytes of E4M3;
    `nested_absmax`: float32 [256], the scale for each byte: its E4M3 value divided by the global scale or, in
    ModelOpt's form, times `weight_scale_2`. 4.5 bits per weight.

    "int4" (compressed-tensors' "pack-quantized", symmetric): `codes`: uint8 [out * in / 2], the integer + 8, with the
    first of two in the low nibble, which are the bytes of `weight_packed`. `absmax`: bfloat16 or float32, one for each
    `blocksize` elements, 32, 64 or 128. 4.5 bits per weight at 32.

    "fp8", E4M3: `codes`: uint8 [out * in]. `absmax`: float32, bfloat16 or uint8 (E8M0), one for each tile of
    `blocksize` columns and as many rows, or one row: [out, in / blocksize] scales or [out / blocksize, in / blocksize],
    rounded up. `blocksize` is 128 for DeepSeek-V3, 32 for MXFP8, and `in` for one scale per row. 8 bits per weight.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    format: str
    """One of `formats.FORMATS`."""
    shape: tuple[int, int]
    blocksize: int
    """Elements in a block."""

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nested(self) -> bool:
        """Whether the scales are quantised too, with an offset."""
        return self.offset is not None

    def tensors(self) -> dict[str, Tensor]:
        """The parts that are tensors, by name, in the order of the descriptions in `formats`."""
        parts = zip(("codes", "absmax", "nested_absmax", "offset"), self[:4], strict=True)
        return {name: part for name, part in parts if part is not None}


def unchecked_quantized(weight: Tensor, format: str, blocksize: int, double_quant: bool) -> QuantizedWeight:
    """Quantises a weight that has been checked, without waiting for a GPU. The caller checks the result: with
    `check_scales` if the weight may not be finite, otherwise with `check_offset`, because the mean of the scales may
    overflow."""
    global_scale = None
    if FORMATS[format].scales == "e4m3":
        # compressed-tensors' global scale: the largest element becomes 6 * 448, the largest of both formats.
        global_scale = torch.nan_to_num(2688 / weight.abs().amax().float(), 1.0, 1.0, 1.0)
    codes, absmax = _OPS.quantize(weight, format, blocksize, global_scale)
    shape = (weight.shape[0], weight.shape[1])
    return quantized_weight(format, codes, absmax, shape, blocksize, double_quant, global_scale)


def quantized_weight(
    format: str,
    codes: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    blocksize: int,
    double_quant: bool,
    global_scale: Tensor | None = None,
) -> QuantizedWeight:
    """Builds a weight from codes and float32 scales, which are stored in the format's dtype or, with `double_quant`,
    quantised. `global_scale`: for "nvfp4"."""
    nested_absmax = offset = None
    scales = FORMATS[format].scales
    if double_quant:
        # bitsandbytes' bytes follow from torch's own mean. For more scales than this, torch divides the sum among
        # threads, so that its bits depend on their number. In this case the op computes the sum itself.
        mean = absmax.mean() if absmax.numel() <= 32768 else None
        absmax, nested_absmax, offset = _OPS.quantize_absmax(absmax, mean)
    elif scales == "e8m0":
        absmax = (absmax.view(torch.int32) >> 23).to(torch.uint8)
    elif scales == "bfloat16":
        absmax = absmax.bfloat16()
    elif global_scale is not None:
        absmax = (absmax * global_scale).to(torch.float8_e4m3fn).view(torch.uint8)
        nested_absmax = e4m3_values(absmax.device) / global_scale
    return QuantizedWeight(codes, absmax, nested_absmax, offset, format, shape, blocksize)


def e4m3_values(device: torch.device) -> Tensor:
    """float32 [256]: the value of each byte of E4M3."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()


def check_scales(weight: QuantizedWeight) -> QuantizedWeight:
    """Returns the weight if what was quantised was finite, which its scales show, and if the mean of nested scales is
    finite. The host waits for one number."""
    mark = (_largest_scale(weight) if weight.offset is None else weight.offset).item()
    if not math.isfinite(mark):
        # Finite scales minus an infinite mean are infinite; other scales are NaN.
        if weight.nested_absmax is None or weight.nested_absmax.isnan().any():
            check_finite(mark)
        check_offset(mark)
    return weight


def _largest_scale(weight: QuantizedWeight) -> Tensor:
    """Returns a number that is not finite if any scale is not."""
    largest = weight.absmax.amax()
    if weight.absmax.dtype != torch.uint8:
        return largest
    if weight.nested_absmax is not None:  # without sign, the highest bytes of E4M3 are the largest numbers, then NaN
        return weight.nested_absmax[largest.long()]
    return torch.where(largest == 255, torch.nan, 0.0)


def check_offset(offset: float, name: str = "weight") -> None:
    """Raises ValueError unless the scales have a finite mean."""
    if not math.isfinite(offset):
        raise ValueError(
            f"{name}: the mean of its scales overflows float32; use double_quant=False, or smaller weights"
        )


def offsets_of(parts: Sequence[Tensor | QuantizedWeight]) -> Tensor:
    """The offsets of nested scales, 0 for weights without them: float32 [parts], with at least one part."""
    offsets = [part.offset if isinstance(part, QuantizedWeight) else None for part in parts]
    zero = (parts[0].codes if isinstance(parts[0], QuantizedWeight) else parts[0]).new_zeros((), dtype=torch.float32)
    return torch.stack([zero if offset is None else offset for offset in offsets])


def quantize(
    weight: Tensor,
    format: str = DEFAULT,
    *,
    blocksize: int | None = None,
    double_quant: bool | None = None,
    second_moment: Tensor | None = None,
) -> QuantizedWeight:
    """Converts a weight to codes and scales.

    Args:
        weight: [out, in], float32, bfloat16 or float16, finite.
        format: "nf4", as `bitsandbytes.functional.quantize_4bit`; "int8", as its `int8_vectorwise_quant`; "nf3" or
            "nf2"; "mxfp4", "nvfp4", "int4" or "fp8", as compressed-tensors quantises a float32 weight, except that the
            codes of "int4" and "fp8" are those of elements divided by the stored scale.
        blocksize: elements per scale: 32, 64, ..., 4096 (default: 64). For "int4" 32, 64 or 128, which must divide a
            row. For "mxfp4" 32 and for "nvfp4" 16, which must divide a row. For "int8" and "fp8" always a row.
        double_quant: whether the scales of "nf4", "nf3" and "nf2" are quantised too, to 8 bits in blocks of 256
            (bitsandbytes' `compress_statistics`). None: if the format supports it.
        second_moment: E[xᵀx] of the layer's inputs, as `split` takes it. The codes are then found by error feedback
            (`ops._second_moment`), which loses less of the outputs. The scales stay those of the weight. A row must end
            with a whole byte.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    weight = check_matrix(weight)
    check_choice("format", format, FORMATS)
    blocksize, double_quant = FORMATS[format].options(blocksize, double_quant, weight.shape[1])
    nearest = check_scales(unchecked_quantized(weight, format, blocksize, double_quant))
    if second_moment is None:
        return nearest
    check_whole_bytes(format, weight)
    moments = check_moments([second_moment], [weight], ["second_moment"], ["weight"])
    return with_feedback(weight, nearest, feedback_factors(moments)[0])


def with_feedback(weight: Tensor, nearest: QuantizedWeight, factor: Tensor) -> QuantizedWeight:
    """Returns the weight with the same scales and codes by error feedback. `factor` comes from `feedback_factors`."""
    return nearest._replace(codes=_OPS.feedback_codes(weight, factor, *nearest[1:5], nearest.blocksize))


def nearest_codes(weight: Tensor, held: QuantizedWeight) -> QuantizedWeight:
    """Returns a weight [out, in] in the codes nearest to it under the scales of `held`, which has a format of released
    models. It is error feedback that passes no error on, 128 columns at a time."""
    columns, blocksize = held.shape[1], held.blocksize
    scales = held.absmax.view(-1, -(-columns // blocksize))
    found = []
    for first in range(0, columns, 128):
        part = weight[:, first : first + 128]
        width = part.shape[1]
        own = scales[:, first // blocksize : -(-(first + width) // blocksize)].reshape(-1)
        apart = torch.eye(width, device=weight.device)
        size = blocksize if blocksize <= 128 else width  # otherwise each row has one scale
        found.append(_OPS.feedback_codes(part, apart, own, *held[2:5], size).view(len(weight), -1))
    return held._replace(codes=torch.cat(found, 1).view(-1))


def check_whole_bytes(format: str, weight: Tensor, name: str = "weight") -> None:
    """Checks that each row of a weight ends with a whole byte of codes, which error feedback needs."""
    share = 8 // math.gcd(8, FORMATS[format].bits)
    if weight.shape[1] % share:
        raise ValueError(
            f"{name}: got {weight.shape[1]} columns; needed by error feedback in {format}: a multiple of {share}"
        )


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Converts codes and scales to a dense weight.

    Args:
        weight: the codes and scales of a matrix [out, in].
        dtype: float32, bfloat16 or float16.

    Returns:
        [out, in] in `dtype`, rounded once from float32.

    Raises:
        TypeError, ValueError: an argument, or a part of the weight, is invalid; the message names it.
    """
    check_quantized(weight)
    if dtype not in FLOATS:
        raise TypeError(f"dtype: got {dtype}; allowed: float32, bfloat16, float16")
    codes, absmax, nested_absmax, offset, format, (rows, cols), blocksize = weight
    dense: Tensor = _OPS.dequantize(codes, absmax, nested_absmax, offset, format, blocksize, rows, cols, dtype)
    return dense


def check_quantized(weight: object) -> QuantizedWeight:
    """Called before each product, so it must be fast: what the compiled ops also check is left to them."""
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"weight: got {type(weight).__name__}; needed: QuantizedWeight")
    codes, absmax, nested_absmax, offset, name, shape, blocksize = weight
    check_choice("weight.format", name, FORMATS)
    format = FORMATS[name]
    if format.scales == "tiles":
        _check_tiles(weight)
        expected = {"codes": math.prod(shape)}
    else:
        expected = _expected_sizes(weight, format)
    check_tensor("weight.codes", codes, (torch.uint8,))
    for part, size in expected.items():
        tensor = codes if part == "codes" else absmax
        if tensor.numel() != size:
            raise ValueError(
                f"weight.{part}: got {tensor.numel()} elements; needed: {size} for shape {list(shape)} and "
                f"blocksize {blocksize}"
            )
    check_devices(
        {
            "weight.codes": codes,
            "weight.absmax": absmax,
            "weight.nested_absmax": nested_absmax,
            "weight.offset": offset,
        }
    )
    return weight


def _expected_sizes(weight: QuantizedWeight, format: QuantFormat) -> dict[str, int]:
    """The numbers of elements of codes and scales, for formats with one kind of scales."""
    _, absmax, nested_absmax, offset, _, shape, blocksize = weight
    nested = nested_absmax is not None and format.scales != "e4m3"
    format.options(blocksize if format.blocksizes else None, nested, shape[1])
    if not format.blocksizes and blocksize != shape[1]:
        raise ValueError(f"weight.blocksize: got {blocksize}; needed: {shape[1]}, a row")
    expected = format.tensors(shape, blocksize, nested)
    dtypes = (expected["absmax"][1], *((torch.float32,) if format.scales == "bfloat16" else ()))
    if check_tensor("weight.absmax", absmax, SCALES).dtype not in dtypes or nested != (offset is not None):
        raise ValueError(
            "weight: nested scales need absmax uint8, nested_absmax and offset together"
            if format.has_double_quant
            else f"weight.absmax: got {absmax.dtype}; needed for {format.name}: {' or '.join(map(str, dtypes))}"
        )
    if (nested_absmax is not None) != ("nested_absmax" in expected):
        raise ValueError(f"weight.nested_absmax: needed only by nvfp4 and nested scales; got {format.name}")
    return {part: math.prod(expected[part][0]) for part in ("codes", "absmax")}


def _check_tiles(weight: QuantizedWeight) -> None:
    """Checks that the scales of "fp8" are those of tiles."""
    (rows, cols), blocksize, absmax = weight.shape, weight.blocksize, weight.absmax
    check_tensor("weight.absmax", absmax, SCALES)
    if weight.nested_absmax is not None or weight.offset is not None:
        raise ValueError("weight.nested_absmax: needed only by nvfp4 and nested scales; got fp8")
    if blocksize < 1:
        raise ValueError(f"weight.blocksize: got {blocksize}; allowed: from 1 on")
    across = -(-cols // blocksize)
    if absmax.numel() not in (allowed := (rows * across, -(-rows // blocksize) * across)):
        raise ValueError(f"weight.absmax: got {absmax.numel()} elements; needed: {' or '.join(map(str, allowed))}")
