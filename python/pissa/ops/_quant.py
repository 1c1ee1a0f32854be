"""Quantised weights: conversion to codes and scales, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pissa.ops import _autograd  # noqa: F401  registers fakes and gradients
from pissa.ops.checks import FLOATS, check_choice, check_devices, check_finite, check_matrix, check_tensor
from pissa.ops.formats import DEFAULT, FORMATS, READ

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

    The blocks of GGUF files, which are read but never written: "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl" and
    "mxfp4_gguf" of 32 elements, "q2_k", "q3_k", "q4_k", "q5_k", "q6_k" and "iq4_xs" of 256 (cpp/pissa/core/gguf.h).
    `codes`: uint8, the bytes of the file, with the scales inside each block. `absmax`: uint8 [0].
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    format: str
    """One of `formats.READ`."""
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
        return {name: part for name, part in zip(self._fields, self[:4], strict=False) if part is not None}


def unchecked_quantized(
    weight: Tensor, format: str, blocksize: int, double_quant: bool
) -> tuple[QuantizedWeight, Tensor]:
    """Quantises a weight without waiting for a GPU. Returns it and its scales in float32, which are finite if the
    weight is. The caller checks with `check_offset` whether the mean of the scales overflows."""
    global_scale = None
    if FORMATS[format].scales == "e4m3":
        # compressed-tensors' global scale: the largest element becomes 6 * 448, the largest of both formats.
        global_scale = torch.nan_to_num(2688 / weight.abs().amax().float(), 1.0, 1.0, 1.0)
    codes, absmax = _OPS.quantize(weight, format, blocksize, global_scale)
    return quantized_weight(weight, format, codes, absmax, blocksize, double_quant, global_scale), absmax


def quantized_weight(
    weight: Tensor,
    format: str,
    codes: Tensor,
    absmax: Tensor,
    blocksize: int,
    double_quant: bool,
    global_scale: Tensor | None = None,
) -> QuantizedWeight:
    """Builds the codes of a weight from codes and float32 scales, which are stored in the format's dtype or, with
    `double_quant`, quantised. `global_scale`: for "nvfp4"."""
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
    return QuantizedWeight(codes, absmax, nested_absmax, offset, format, (weight.shape[0], weight.shape[1]), blocksize)


def e4m3_values(device: torch.device) -> Tensor:
    """float32 [256]: the value of each byte of E4M3."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()


def check_offset(offset: float, name: str = "weight") -> None:
    """Raises ValueError unless the scales have a finite mean."""
    if not math.isfinite(offset):
        raise ValueError(
            f"{name}: the mean of its scales overflows float32; use double_quant=False or smaller weights [P036]"
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
) -> QuantizedWeight:
    """Converts a weight to codes and scales.

    Args:
        weight: [out, in], float32, bfloat16 or float16, finite.
        format: "nf4", as `bitsandbytes.functional.quantize_4bit`; "int8", as its `int8_vectorwise_quant`; "mxfp4",
            "nvfp4", "int4" or "fp8", as compressed-tensors quantises a float32 weight, except that the codes of "int4"
            and "fp8" are those of elements divided by the stored scale.
        blocksize: elements per scale: 32, 64, ..., 4096 (default: 64). For "int4" 32, 64 or 128, which must divide a
            row. For "mxfp4" 32 and for "nvfp4" 16, which must divide a row. For "int8" and "fp8" always a row.
        double_quant: whether the scales of "nf4" are quantised too, to 8 bits in blocks of 256 (bitsandbytes'
            `compress_statistics`). None: if the format supports it.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    weight = check_matrix(weight)
    check_choice("format", format, FORMATS)
    blocksize, double_quant = FORMATS[format].options(blocksize, double_quant, weight.shape[1])
    nearest, scales = unchecked_quantized(weight, format, blocksize, double_quant)
    largest, offset = torch.cat([scales.amax()[None], offsets_of([nearest])]).tolist()  # the host waits here, once
    check_finite(largest)
    check_offset(offset)
    return nearest


def with_feedback(weight: Tensor, nearest: QuantizedWeight, factor: Tensor) -> QuantizedWeight:
    """Returns the weight with the same scales and codes by error feedback. `factor` comes from `feedback_factors`."""
    return nearest._replace(codes=_OPS.feedback_codes(weight, factor, *nearest[1:5], nearest.blocksize))


def check_feedback(form: str, weights: Sequence[Tensor], names: Sequence[str]) -> None:
    """Checks that the named weights can have codes by error feedback in this form: each row must end with a whole
    byte."""
    if form not in FORMATS:
        raise ValueError(f"form: got {form!r} with error feedback; allowed: {', '.join(map(repr, FORMATS))}")
    share = 8 // math.gcd(8, FORMATS[form].bits)
    for weight, name in zip(weights, names, strict=True):
        if weight.shape[1] % share:
            columns = f"got {weight.shape[1]} columns; needed by error feedback in {form}"
            raise ValueError(f"{name}: {columns}: a multiple of {share}")


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


def embedding(indices: Tensor, weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Looks up rows of a quantised weight, as torch.nn.functional.embedding does in a dense one.

    Args:
        indices: int64 or int32 of any shape.
        weight: the codes and scales of a matrix [vocabulary, dim].
        dtype: float32, bfloat16 or float16.

    Returns:
        The shape of `indices` and dim, in `dtype`, rounded once from float32. It has no gradient.

    Raises:
        TypeError, ValueError: an argument, or a part of the weight, is invalid; the message names it.
        IndexError: an index is not in the vocabulary. On a GPU this is not checked, and such a row is the first.
    """
    check_quantized(weight)
    if dtype not in FLOATS:
        raise TypeError(f"dtype: got {dtype}; allowed: float32, bfloat16, float16")
    indices = check_tensor("indices", indices, (torch.int64, torch.int32)).long()
    check_devices({"indices": indices, "weight.codes": weight.codes})
    codes, absmax, nested_absmax, offset, format, (rows, cols), blocksize = weight
    if indices.device.type == "cpu" and indices.numel() and not torch.compiler.is_compiling():
        least, most = indices.aminmax()
        if least < 0 or most >= rows:
            raise IndexError(f"indices: got {least if least < 0 else most}; allowed: from 0 to {rows - 1}")
    looked_up: Tensor = _OPS.dequantize_rows(
        codes, absmax, nested_absmax, offset, format, blocksize, rows, cols, indices, dtype
    )
    return looked_up


def check_quantized(weight: object) -> QuantizedWeight:
    """Called before each product, so it must be fast: what the compiled ops also check is left to them."""
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"weight: got {type(weight).__name__}; needed: QuantizedWeight")
    codes, absmax, nested_absmax, offset, name, shape, blocksize = weight
    check_choice("weight.format", name, READ)
    format, (rows, cols) = READ[name], shape
    has_table = nested_absmax is not None
    if has_table not in _HAS_TABLE.get(format.scales, (False,)):
        got = "a tensor" if has_table else None
        raise ValueError(f"weight.nested_absmax: got {got}, for {name}; needed only by nvfp4 and nested scales")
    nested = has_table and format.has_double_quant
    if format.scales == "tiles":
        if blocksize < 1:
            raise ValueError(f"weight.blocksize: got {blocksize}; allowed: from 1 on")
        across = -(-cols // blocksize)
        scales: tuple[int, ...] = (rows * across, -(-rows // blocksize) * across)
    else:
        format.options(blocksize if format.blocksizes else None, nested, cols)
        if not format.blocksizes and blocksize != cols:
            raise ValueError(f"weight.blocksize: got {blocksize}; needed: {cols}, a row")
        scales = (0 if format.is_read_only else -(-rows * cols // blocksize),)
    expected = format.tensors(shape, blocksize, nested)
    dtypes = _DTYPES.get(format.scales, (expected["absmax"][1],))
    if check_tensor("weight.absmax", absmax, SCALES).dtype not in dtypes or nested != (offset is not None):
        raise ValueError(
            "weight: nested scales need absmax uint8, nested_absmax and offset together"
            if format.has_double_quant
            else f"weight.absmax: got {absmax.dtype}; needed for {name}: {' or '.join(map(str, dtypes))}"
        )
    check_tensor("weight.codes", codes, (torch.uint8,))
    for part, tensor, counts in (("codes", codes, expected["codes"][0]), ("absmax", absmax, scales)):
        if tensor.numel() not in counts:
            raise ValueError(
                f"weight.{part}: got {tensor.numel()} elements; needed: {' or '.join(map(str, counts))} for shape "
                f"{list(shape)} and blocksize {blocksize}"
            )
    check_devices(dict(zip(_PARTS, weight[:4], strict=True)))
    return weight


_PARTS = ("weight.codes", "weight.absmax", "weight.nested_absmax", "weight.offset")
_HAS_TABLE = {"nested": (True, False), "e4m3": (True,)}  # whether there is a nested_absmax, by the kind of scales
_DTYPES = {"tiles": SCALES, "bfloat16": (torch.bfloat16, torch.float32)}  # of scales that have a choice
