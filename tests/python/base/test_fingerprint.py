"""Fingerprints of weights."""

from __future__ import annotations

import struct

import pytest
import torch
import xxhash

from cuda_stand_in import CudaStandIn
from pissa.base.digest import (
    KINDS,
    SUMS,
    XXH3,
    Match,
    dtype_of,
    fingerprint,
    is_fingerprint,
    kind_of,
    match,
    read,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def weight() -> torch.Tensor:
    return torch.randn(60, 50, generator=torch.Generator().manual_seed(0)) / 8


def test_fingerprints_tell_values_and_shapes_apart() -> None:
    one = weight()
    changed = one.clone()
    changed.view(torch.int32)[59, 49] ^= 1
    fingerprints = {str(fingerprint(tensor)) for tensor in (one, one.T, changed, one.view(50, 60), one.bfloat16())}
    assert len(fingerprints) == 5
    assert str(fingerprint(one)) == str(fingerprint(one.clone())) == str(fingerprint(one.T.contiguous().T))


def test_fingerprint_is_the_same_on_every_machine() -> None:
    values = [k / 8 for k in range(12)]
    bfloat16 = b"".join(struct.pack("<f", value)[2:] for value in values)
    digest = xxhash.xxh3_128_hexdigest(b"torch.bfloat16 (3, 4);" + bfloat16)
    sample = struct.pack("<8f", *(values[(2 * k + 1) * 12 // 16] for k in range(8))).hex()
    assert digest == "68577c773a89b2cbef6d14097043ba91"
    assert str(fingerprint(torch.tensor(values).reshape(3, 4).bfloat16())) == f"xxh3:bfloat16:{digest}:{sample}"


# ---- Dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("here", FLOATS)
@pytest.mark.parametrize("trained", FLOATS)
@pytest.mark.parametrize("stored", FLOATS)
def test_a_base_is_recognised_in_another_dtype(
    stored: torch.dtype, trained: torch.dtype, here: torch.dtype, kind: str
) -> None:
    """A checkpoint in the dtype `stored` was loaded in `trained`, and is loaded in `here` now."""
    checkpoint = weight().to(stored)
    recorded = str(fingerprint(checkpoint.to(trained), kind=kind))
    assert (kind_of(recorded), dtype_of(recorded)) == (kind, trained)
    loaded = checkpoint.to(here)
    is_exact = torch.equal(loaded.to(trained), checkpoint.to(trained))
    assert is_exact or torch.promote_types(here, stored) != here
    assert match(recorded, loaded) is (Match.SAME if is_exact else Match.ROUNDED)
    other = checkpoint.clone()
    other.view(-1)[3 * 3000 // 16] *= 1.1  # an element of the sample
    for different in (other.to(here), weight().roll(1).to(here)):
        assert match(recorded, different) is Match.OTHER


def test_a_dtype_that_holds_the_values_must_have_all_of_them() -> None:
    """Roundings are no excuse then: one element that is not sampled, off by a roundoff, is another weight."""
    recorded = str(fingerprint(weight().bfloat16()))
    other = weight().bfloat16().float()
    other[0, 0] *= 1 + 2.0**-7
    assert match(recorded, other) is Match.OTHER
    assert match(recorded, other.half()) is Match.ROUNDED


@pytest.mark.parametrize("here", FLOATS[1:])
def test_the_bound_of_a_rounding_is_tight(here: torch.dtype) -> None:
    info = torch.finfo(here)
    recorded = str(fingerprint(weight()))
    for error, expected in ((0.4 * info.eps, Match.ROUNDED), (4 * info.eps, Match.OTHER)):
        assert match(recorded, (weight() * (1 + error)).to(here)) is expected


# ---- Kinds -----------------------------------------------------------------------------------------------------------


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 5, generator=generator), torch.randint(0, 256, (99,), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_of_any_kind_is_compared_on_any_device(kind: str) -> None:
    here = tensors()
    recorded = str(fingerprint(*here, kind=kind))
    assert kind_of(recorded) == kind
    with CudaStandIn() as gpu:
        there = tuple(map(gpu.put, here))
        assert str(fingerprint(*there, kind=kind)) == recorded
        for found in (here, there):
            assert is_fingerprint(recorded, *found)
            assert not is_fingerprint(recorded, *reversed(found))
            assert not is_fingerprint(None, *found)
            found[0][3, 2] *= 2
            assert not is_fingerprint(recorded, *found)


def test_a_gpu_keeps_its_fingerprints_until_they_are_read_together() -> None:
    with CudaStandIn() as gpu:
        weights = [gpu.put(tensors()[0] + k) for k in range(5)]
        here = fingerprint(tensors()[0])
        found = [here, *(fingerprint(weight) for weight in weights)]
        assert [one.kind for one in found] == [XXH3, *[SUMS] * 5]
        assert gpu.waits() == 0
        texts = read(found)
        assert (gpu.waits(), gpu.bytes_read()) == (1, 5 * 48)
        assert texts == [str(one) for one in found] == read(found)
        assert gpu.waits() == 1
    assert texts[0] == str(fingerprint(tensors()[0]))
    assert all(map(is_fingerprint, texts[1:], (tensors()[0] + k for k in range(5))))
