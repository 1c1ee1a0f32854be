"""Fingerprints of weights."""

from __future__ import annotations

import struct

import pytest
import torch
import xxhash

from cuda_stand_in import CudaStandIn
from pissa.base import digest
from pissa.base.digest import Match, dtype_of, fingerprint, is_fingerprint, match

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def weight() -> torch.Tensor:
    return torch.randn(60, 50, generator=torch.Generator().manual_seed(0)) / 8


def test_fingerprints_tell_values_and_shapes_apart() -> None:
    one = weight()
    changed = one.clone()
    changed.view(torch.int32)[59, 49] ^= 1
    fingerprints = {fingerprint(tensor) for tensor in (one, one.T, changed, one.view(50, 60), one.bfloat16())}
    assert len(fingerprints) == 5
    assert fingerprint(one) == fingerprint(one.clone()) == fingerprint(one.T.contiguous().T)


def test_fingerprint_is_the_same_on_every_machine() -> None:
    values = [k / 8 for k in range(12)]
    bfloat16 = b"".join(struct.pack("<f", value)[2:] for value in values)
    hashed = xxhash.xxh3_128_hexdigest(b"torch.bfloat16 (3, 4);" + bfloat16)
    sample = struct.pack("<8f", *(values[(2 * k + 1) * 12 // 16] for k in range(8))).hex()
    assert hashed == "68577c773a89b2cbef6d14097043ba91"
    assert fingerprint(torch.tensor(values).reshape(3, 4).bfloat16()) == f"xxh3:bfloat16:{hashed}:{sample}"


# ---- Dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("here", FLOATS)
@pytest.mark.parametrize("trained", FLOATS)
@pytest.mark.parametrize("stored", FLOATS)
def test_a_base_is_recognised_in_another_dtype(stored: torch.dtype, trained: torch.dtype, here: torch.dtype) -> None:
    """A checkpoint in the dtype `stored` was loaded in `trained`, and is loaded in `here` now."""
    checkpoint = weight().to(stored)
    recorded = fingerprint(checkpoint.to(trained))
    assert dtype_of(recorded) == trained
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
    recorded = fingerprint(weight().bfloat16())
    other = weight().bfloat16().float()
    other[0, 0] *= 1 + 2.0**-7
    assert match(recorded, other) is Match.OTHER
    assert match(recorded, other.half()) is Match.ROUNDED


@pytest.mark.parametrize("here", FLOATS[1:])
def test_the_bound_of_a_rounding_is_tight(here: torch.dtype) -> None:
    info = torch.finfo(here)
    recorded = fingerprint(weight())
    for error, expected in ((0.4 * info.eps, Match.ROUNDED), (4 * info.eps, Match.OTHER)):
        assert match(recorded, (weight() * (1 + error)).to(here)) is expected


# ---- Devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.cpu_only
def test_a_gpu_s_tensors_are_fetched_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_FETCHED", 1000)
    dense, codes = weight(), torch.arange(99, dtype=torch.uint8)
    for tensors, dtype in (((dense,), torch.float32), ((dense,), torch.bfloat16), ((codes, dense.T), None)):
        recorded = fingerprint(*tensors, dtype=dtype)
        with CudaStandIn() as gpu:
            there = tuple(map(gpu.put, tensors))
            gpu.forget()
            assert fingerprint(*there, dtype=dtype) == recorded
            assert len(gpu.reads) == 4  # three pieces, and a sample or the codes
            assert max(transfer.bytes for transfer in gpu.reads) <= 4000
            assert is_fingerprint(recorded, *there)
            there[0].view(-1)[77] += 1
            assert not is_fingerprint(recorded, *there)
            assert not is_fingerprint(None, *there)
