"""Quantised weights: to codes and scales, and back."""

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
"""dtypes of scales."""


class QuantizedWeight(NamedTuple):
    """A weight [out, in] as codes and scales, byte for byte as the libraries store them that have the format.

    "nf4", 4-bit NormalFloat (QLoRA, arXiv 2305.14314): blocks of `blocksize` elements run over the flattened weight and
    may cross rows. `codes`: uint8 [ceil(out * in / 2)], the first of two elements in the high nibble. `absmax`: float32
    [blocks]; or, with double quantisation, uint8 [blocks] together with `nested_absmax` float32 [ceil(blocks / 256)]
    and `offset` float32 []. At the default block size 64 that is 4.5 bits per weight, 4.127 nested.

    "int8" (LLM.int8(), arXiv 2208.07339): a block is a row. `codes`: uint8 [out * in], the bytes of bitsandbytes' int8
    `CB`; `absmax`: float32 [out], its `SCB`, the largest absolute value of each row. An element is
    code * absmax / 127. That is 8 bits per weight, and 32 per row.

    "nf3" and "nf2", NormalFloats of 3 and 2 bits with NF4's blocks and scales, in bytes of our own: `codes` one after
    the other from the lowest bit of the first byte on (cpp/pissa/core/normal_float.h). 3.127 and 2.127 bits per weight,
    nested, at block size 64.

    Formats of released models, whose elements are codes times scales, rounded once:

    "mxfp4" (OCP Microscaling Formats 1.0; gpt-oss, compressed-tensors): `codes`: uint8 [out * in / 2], E2M1, the first
    of two elements in the low nibble. `absmax`: uint8 [out * in / 32], E8M0, 2^(byte - 127). 4.25 bits per weight.

    "nvfp4" (compressed-tensors, ModelOpt): such codes; `absmax`: uint8 [out * in / 16], bytes of E4M3;
    `nested_absmax`: float32 [256], the scale that each byte stands for, its number divided by the global scale or, as
    ModelOpt has it, times `weight_scale_2`. 4.5 bits per weight.

    "int4" (compressed-tensors' "pack-quantized", symmetric): `codes`: uint8 [out * in / 2], the integer + 8, the first
    of two in the low nibble, which are the bytes of `weight_packed`. `absmax`: bfloat16 or float32, one for `blocksize`
    elements, 32, 64 or 128. 4.5 bits per weight at 32.

    "fp8", E4M3: `codes`: uint8 [out * in]. `absmax`: float32, bfloat16 or uint8 (E8M0), one for each tile of
    `blocksize` columns and of as many rows, or of one: [out, in / blocksize] scales or [out / blocksize, in /
    blocksize], rounded up. 128 is DeepSeek-V3's, 32 MXFP8's, `in` that of a scale for each row. 8 bits per weight.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    format: str
    """One of `formats.FORMATS`."""
    shape: tuple[int, int]
    blocksize: int
    """Elements of a block."""

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nested(self) -> bool:
        """Whether the scales are quantised too, with an offset."""
        return self.offset is not None

    def tensors(self) -> dict[str, Tensor]:
        """The parts that are tensors, by name; what `formats` says of them is in the same order."""
        parts = zip(("codes", "absmax", "nested_absmax", "offset"), self[:4], strict=True)
        return {name: part for name, part in parts if part is not None}


def unchecked_quantized(weight: Tensor, format: str, blocksize: int, double_quant: bool) -> QuantizedWeight:
    """A weight that is fit for it, quantised. Nothing waits for a GPU; the result is to be checked, by `check_scales`
    where the weight may not be finite, otherwise by `check_offset`: the mean of the scales may overflow."""
    global_scale = None
    if FORMATS[format].scales == "e4m3":
        # compressed-tensors' global scale: the largest element is 6 times 448, the largest of either format.
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
    """Of codes and float32 scales, which are stored as the format has them, or which `double_quant` quantises.
    `global_scale`: that of "nvfp4"."""
    nested_absmax = offset = None
    scales = FORMATS[format].scales
    if double_quant:
        # bitsandbytes' bytes follow from torch's own mean. Beyond that number torch divides the sum among threads, and
        # its bits depend on them: the op then adds up itself.
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
    """float32 [256]: the number of each byte of E4M3."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()


def check_scales(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight, if what was quantised was finite, which its scales show, and the mean of nested ones is. The host
    waits for one number."""
    mark = (_largest_scale(weight) if weight.offset is None else weight.offset).item()
    if not math.isfinite(mark):
        # Scales that are finite are infinite less an infinite mean; others are NaN.
        if weight.nested_absmax is None or weight.nested_absmax.isnan().any():
            check_finite(mark)
        check_offset(mark)
    return weight


def _largest_scale(weight: QuantizedWeight) -> Tensor:
    """Not finite if any scale is not."""
    largest = weight.absmax.amax()
    if weight.absmax.dtype != torch.uint8:
        return largest
    if weight.nested_absmax is not None:  # the highest bytes of E4M3 without a sign are the largest numbers, then NaN
        return weight.nested_absmax[largest.long()]
    return torch.where(largest == 255, torch.nan, 0.0)


def check_offset(offset: float, name: str = "weight") -> None:
    """Whether scales have a finite mean."""
    if not math.isfinite(offset):
        raise ValueError(
            f"{name}: the mean of its scales overflows float32; use double_quant=False, or smaller weights"
        )


def offsets_of(parts: Sequence[Tensor | QuantizedWeight]) -> Tensor:
    """The offsets of nested scales, 0 where there are none: float32 [parts], one at least."""
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
    """A weight as codes and scales.

    Args:
        weight: [out, in], float32, bfloat16 or float16, finite.
        format: "nf4", as `bitsandbytes.functional.quantize_4bit`, "int8", as its `int8_vectorwise_quant`, "nf3",
            "nf2"; "mxfp4", "nvfp4", "int4" and "fp8", as compressed-tensors quantises a float32 weight, but that codes
            of "int4" and "fp8" are of elements divided by the scale that is stored.
        blocksize: elements per scale: 32, 64, ..., 4096; of "int4" 32, 64 or 128, which divides a row. None: 64. Of
            "mxfp4" 32 and of "nvfp4" 16, which divide a row; of "int8" and "fp8" always a row.
        double_quant: quantise the scales of "nf4", "nf3" and "nf2" too, to 8 bits in blocks of 256 (bitsandbytes'
            `compress_statistics`). None: where the format has it.
        second_moment: E[xᵀx] of the layer's inputs, as `split` takes it. The codes are then found by error feedback
            (`ops._second_moment`), which loses less of the outputs; the scales stay those of the weight. A row has to
            end with a whole byte.

    Raises:
        TypeError, ValueError: naming the argument.
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
    """The weight with the same scales and with codes by error feedback, `factor` being of `feedback_factors`."""
    return nearest._replace(codes=_OPS.feedback_codes(weight, factor, *nearest[1:5], nearest.blocksize))


def nearest_codes(weight: Tensor, held: QuantizedWeight) -> QuantizedWeight:
    """A weight [out, in] in the codes nearest to it under the scales of `held`, which is of a format of released
    models: error feedback that hands nothing on, 128 columns at a time."""
    columns, blocksize = held.shape[1], held.blocksize
    scales = held.absmax.view(-1, -(-columns // blocksize))
    found = []
    for first in range(0, columns, 128):
        part = weight[:, first : first + 128]
        width = part.shape[1]
        own = scales[:, first // blocksize : -(-(first + width) // blocksize)].reshape(-1)
        apart = torch.eye(width, device=weight.device)
        size = blocksize if blocksize <= 128 else width  # else a row has one
        found.append(_OPS.feedback_codes(part, apart, own, *held[2:5], size).view(len(weight), -1))
    return held._replace(codes=torch.cat(found, 1).view(-1))


def check_whole_bytes(format: str, weight: Tensor, name: str = "weight") -> None:
    """Whether each row of a weight ends with a whole byte of codes, as error feedback needs it."""
    share = 8 // math.gcd(8, FORMATS[format].bits)
    if weight.shape[1] % share:
        raise ValueError(
            f"{name}: got {weight.shape[1]} columns; needed by error feedback in {format}: a multiple of {share}"
        )


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight of codes and scales.

    Args:
        weight: codes of a matrix [out, in].
        dtype: float32, bfloat16 or float16.

    Returns:
        [out, in] in `dtype`, rounded once from float32.

    Raises:
        TypeError, ValueError: naming the argument, or the part of the weight that does not fit.
    """
    check_quantized(weight)
    if dtype not in FLOATS:
        raise TypeError(f"dtype: got {dtype}; allowed: float32, bfloat16, float16")
    codes, absmax, nested_absmax, offset, format, (rows, cols), blocksize = weight
    dense: Tensor = _OPS.dequantize(codes, absmax, nested_absmax, offset, format, blocksize, rows, cols, dtype)
    return dense


def check_quantized(weight: object) -> QuantizedWeight:
    """Before each product, so that it has to be quick: what the compiled ops check too is left to them."""
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
    """Elements of codes and scales, where scales are of one kind."""
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
        raise ValueError(f"weight.nested_absmax: needed by nvfp4 and nested scales alone; got {format.name}")
    return {part: math.prod(expected[part][0]) for part in ("codes", "absmax")}


def _check_tiles(weight: QuantizedWeight) -> None:
    """Whether the scales of "fp8" are those of tiles."""
    (rows, cols), blocksize, absmax = weight.shape, weight.blocksize, weight.absmax
    check_tensor("weight.absmax", absmax, SCALES)
    if weight.nested_absmax is not None or weight.offset is not None:
        raise ValueError("weight.nested_absmax: needed by nvfp4 and nested scales alone; got fp8")
    if blocksize < 1:
        raise ValueError(f"weight.blocksize: got {blocksize}; allowed: from 1 on")
    across = -(-cols // blocksize)
    if absmax.numel() not in (allowed := (rows * across, -(-rows // blocksize) * across)):
        raise ValueError(f"weight.absmax: got {absmax.numel()} elements; needed: {' or '.join(map(str, allowed))}")
