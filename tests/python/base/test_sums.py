"""The fingerprint that a GPU computes where the tensor is."""

from __future__ import annotations

import struct

import pytest
import torch
import xxhash
from torch import Tensor

from devices import put
from pissa.base import digest as module
from pissa.base.digest import as_text, sums


def text(*tensors: Tensor) -> str:
    return as_text(sums(*tensors).tolist())


def weight(*shape: int, seed: int = 0) -> Tensor:
    return put(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


# ---- The definition --------------------------------------------------------------------------------------------------

BITS = 2**64 - 1


def key(seed: bytes, number: int) -> int:
    """SplitMix64 of a state that starts at the seed, odd."""
    z = (int.from_bytes(seed, "big") + (number + 1) * 0x9E3779B97F4A7C15) & BITS
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & BITS
    z = (z ^ z >> 27) * 0x94D049BB133111EB & BITS
    return z ^ z >> 31 | 1


def expected(*matrices: Tensor) -> str:
    """The definition in the integers of Python, for matrices of floats."""
    head = ";".join(f"floats {tuple(matrix.shape)}" for matrix in matrices)
    digest = xxhash.xxh3_128(head.encode()).intdigest()
    totals = [digest >> 64, digest & BITS]
    rows = [row for matrix in matrices for row in matrix.tolist()]
    for which in range(2):
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                (x,) = struct.unpack("<i", struct.pack("<f", value))
                totals[which] += x * key(b"col%d" % (which + 1), j) * key(b"row%d" % (which + 1), i)
    return "".join(f"{total & BITS:016x}" for total in totals)


def test_they_are_what_is_written_of_them() -> None:
    matrices = weight(7, 5), weight(3, 9, seed=1)
    assert text(*matrices) == expected(*matrices)


def test_they_are_the_same_on_every_machine() -> None:
    floats = put(torch.tensor([k / 8 for k in range(12)]).reshape(3, 4))
    codes = put(torch.arange(10_000, dtype=torch.int64).remainder(251).to(torch.uint8))
    assert text(floats) == "ec1395c690f123d766fd37aea5fa6462"
    assert text(codes, floats.flatten(), floats.sum()) == "c815b6abb37076f048b81096bb6cbf69"


@pytest.mark.parametrize("chunk", [1, 40, 1 << 10])
def test_the_size_of_the_chunks_does_not_matter(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = weight(130, 20), weight(5000, seed=1), weight(seed=2), weight(0, seed=3)
    before = text(*parts)
    monkeypatch.setattr(module, "_CHUNK", dict.fromkeys(module._CHUNK, chunk))
    assert text(*parts) == before


def test_values_count_and_neither_dtypes_nor_strides_do() -> None:
    rounded = weight(24, 40).bfloat16()
    assert text(rounded) == text(rounded.float()) == text(rounded.mT.contiguous().mT) == text(rounded.clone())
    assert text(weight(24, 40).half()) == text(weight(24, 40).half().float())
    assert text(rounded) != text(weight(24, 40))
    codes = put(torch.arange(-100, 100, dtype=torch.int8).reshape(10, 20))
    assert text(codes) == text(codes.long())


# ---- Mistakes --------------------------------------------------------------------------------------------------------


def swapped(tensor: Tensor, dim: int) -> Tensor:
    order = torch.arange(tensor.shape[dim], device=tensor.device)
    order[0], order[5] = 5, 0
    return tensor.index_select(dim, order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_likely_to_be_taken_for_a_weight_has_other_sums(dtype: torch.dtype) -> None:
    """Both halves differ, of which each is a fingerprint by itself."""
    one = weight(32, 32).to(dtype)
    shuffled = one.flatten()[torch.randperm(1024, generator=torch.Generator().manual_seed(5)).to(one.device)]
    others = {
        "itself": one,
        "negated": -one,
        "a row negated": torch.cat([-one[:1], one[1:]]),
        "transposed": one.mT,
        "rows swapped": swapped(one, 0),
        "columns swapped": swapped(one, 1),
        "reversed": one.flip(0),
        "rolled": one.roll(1, 1),
        "shuffled": shuffled.view(32, 32),
        "of other shape": one.reshape(16, 64),
        "flat": one.flatten(),
        "twice as large": 2 * one,
        "half as large": one / 2,
        "absolute": one.abs(),
        "without a row": one[1:],
        "with zeros below": torch.cat([one, torch.zeros_like(one[:1])]),
        "other weights": weight(32, 32, seed=1).to(dtype),
        **{f"all {value}": torch.full_like(one, value) for value in (0.0, -0.0, 1.0, -1.0, 2.0)},
        "ones, one row": one.new_ones(1, 1024),
        "the identity": torch.eye(32, dtype=dtype, device=one.device),
    }
    for half in (slice(16), slice(16, 32)):
        found = {name: text(other)[half] for name, other in others.items()}
        assert len(set(found.values())) == len(others), sorted(found.items(), key=lambda item: item[1])


def test_one_bit_of_any_element_counts() -> None:
    one = weight(9, 11)
    found = {text(one)}
    for place in range(99):
        for bit in (0, 22, 23, 31):
            other = one.clone()
            other.view(torch.int32).view(-1)[place] ^= -(2**31) if bit == 31 else 1 << bit
            found.add(text(other))
    assert len(found) == 1 + 99 * 4


def test_where_a_residual_s_tensors_end_counts() -> None:
    """Codes of half a byte each, scales, an offset: in order, and each of its length."""
    codes, scales = put(torch.arange(5000).remainder(256).to(torch.uint8)), weight(300)
    found = [
        text(codes, scales),
        text(scales, codes),
        text(codes),
        text(codes[:-1], codes[-1:], scales),
        text(codes[:-1], scales),
        text(codes, scales[:-1], scales[-1]),
        text(codes, scales[:-1], scales[-1:]),
        text(swapped(codes, 0), scales),
        text(codes, swapped(scales, 0)),
        text(codes.float(), scales),
    ]
    assert len(set(found)) == len(found)
