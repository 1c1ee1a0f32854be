"""NF4: a weight in 4 bits, and back."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pissa.ops import _autograd  # noqa: F401  registers fakes and gradients
from pissa.ops._check import (
    FLOATS,
    check_blocksize,
    check_devices,
    check_tensor,
    check_weight,
)

_OPS = torch.ops.pissa


class Nf4Weight(NamedTuple):
    """A weight [out, in] in 4-bit NormalFloat, byte for byte as bitsandbytes stores it (QLoRA, arXiv 2305.14314).

    Blocks of `blocksize` elements run over the flattened weight and may cross rows. `codes`: uint8
    [ceil(out * in / 2)], the first of two elements in the high nibble. `absmax`: float32 [blocks]; or, with double
    quantisation, uint8 [blocks] together with `nested_absmax` float32 [ceil(blocks / 256)] and `offset` float32 [].
    At the default block size 64 that is 4.5 bits per weight, 4.127 nested.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    shape: tuple[int, int]
    blocksize: int

    @property
    def device(self) -> torch.device:
        return self.codes.device


def nf4_weight(codes: Tensor, absmax: Tensor, weight: Tensor, blocksize: int, double_quant: bool) -> Nf4Weight:
    shape = (weight.shape[0], weight.shape[1])
    if not double_quant:
        return Nf4Weight(codes, absmax, None, None, shape, blocksize)
    offset = _mean(absmax)
    if not math.isfinite(offset.item()):
        raise ValueError("weight: the mean of its scales overflows float32; use double_quant=False, or smaller weights")
    codes8, nested_absmax = _OPS.quantize_absmax(absmax, offset)
    return Nf4Weight(codes, codes8, nested_absmax, offset, shape, blocksize)


def _mean(absmax: Tensor) -> Tensor:
    """The mean to the same bits for any number of threads. Up to 32768 elements torch does not divide a sum among
    threads, and bitsandbytes' bytes follow from torch's own mean; beyond, they vary with the threads there."""
    if absmax.numel() <= 32768:
        return absmax.mean()
    head = absmax[: absmax.numel() // 1024 * 1024].view(-1, 1024)
    total = head.double().sum(1).sum() + absmax[head.numel() :].double().sum()
    return (total / absmax.numel()).float()


def nf4_quantize(weight: Tensor, *, blocksize: int = 64, double_quant: bool = True) -> Nf4Weight:
    """A weight [out, in] (float32, bfloat16 or float16, finite) in NF4: the bytes of `bitsandbytes.quantize_4bit`.

    Args:
        blocksize: elements per scale: 32, 64, ..., 4096.
        double_quant: quantise the scales too, to 8 bits in blocks of 256 (bitsandbytes' `compress_statistics`).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    weight = check_weight(weight)
    check_blocksize(blocksize)
    codes, absmax = _OPS.nf4_quantize(weight, blocksize)
    return nf4_weight(codes, absmax, weight, blocksize, double_quant)


def nf4_dequantize(weight: Nf4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The [out, in] tensor in `dtype` (float32, bfloat16, float16): level * absmax, rounded once."""
    check_nf4(weight)
    if dtype not in FLOATS:
        raise TypeError(f"dtype: got {dtype}; allowed: float32, bfloat16, float16")
    codes, absmax, nested_absmax, offset, (rows, cols), blocksize = weight
    dense: Tensor = _OPS.nf4_dequantize(codes, absmax, nested_absmax, offset, rows, cols, blocksize, dtype)
    return dense


def check_nf4(weight: object) -> Nf4Weight:
    if not isinstance(weight, Nf4Weight):
        raise TypeError(f"weight: got {type(weight).__name__}; needed: Nf4Weight")
    check_tensor("weight.codes", weight.codes, (torch.uint8,))
    check_tensor("weight.absmax", weight.absmax, (torch.float32, torch.uint8))
    check_blocksize(weight.blocksize)
    rows, cols = weight.shape
    blocks = -(-rows * cols // weight.blocksize)
    if weight.codes.numel() != (rows * cols + 1) // 2 or weight.absmax.numel() != blocks:
        raise ValueError(
            f"weight: codes has {weight.codes.numel()} bytes and absmax {weight.absmax.numel()} elements; needed for "
            f"shape [{rows}, {cols}] and blocksize {weight.blocksize}: {(rows * cols + 1) // 2} and {blocks}"
        )
    nested = (weight.nested_absmax is not None, weight.offset is not None, weight.absmax.dtype == torch.uint8)
    if any(nested) != all(nested):
        raise ValueError("weight: nested scales need absmax uint8, nested_absmax and offset together")
    parts = {
        "codes": weight.codes,
        "absmax": weight.absmax,
        "nested_absmax": weight.nested_absmax,
        "offset": weight.offset,
    }
    check_devices({f"weight.{name}": part for name, part in parts.items()})
    return weight
