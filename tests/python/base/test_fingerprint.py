"""Fingerprints of weights."""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch
import xxhash

from cuda_stand_in import CudaStandIn
from pissa.base.digest import KINDS, SHA256, SUMS, XXH3, fingerprint, is_fingerprint, kind_of, read, sha256, xxh3


def test_fingerprints_tell_values_apart_and_dtypes_not() -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    rounded = weight.bfloat16()
    assert xxh3(rounded) == xxh3(rounded.float()) == xxh3(rounded.float().half().float())
    assert xxh3(weight.half()) == xxh3(weight.half().float())
    assert xxh3(weight) != xxh3(rounded)
    assert xxh3(weight) != xxh3(weight.T)
    assert xxh3(weight) == xxh3(weight.T.contiguous().T)
    changed = weight.clone()
    changed.view(torch.int32)[5, 4] ^= 1
    assert xxh3(weight) != xxh3(changed)
    assert xxh3(weight) == xxh3(weight.clone())
    assert len({xxh3(torch.zeros(shape)) for shape in [(2, 3), (3, 2), (6,)]}) == 3


def test_fingerprint_is_the_same_on_every_machine() -> None:
    values = [k / 8 for k in range(12)]
    bfloat16 = b"".join(struct.pack("<f", value)[2:] for value in values)
    hashed = b"torch.bfloat16 (3, 4);" + bfloat16
    tensor = torch.tensor(values).reshape(3, 4)
    assert sha256(tensor) == hashlib.sha256(hashed).hexdigest()
    assert xxh3(tensor) == f"xxh3:{xxhash.xxh3_128_hexdigest(hashed)}" == "xxh3:68577c773a89b2cbef6d14097043ba91"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", [0, 70_000, 199_999])
def test_one_value_too_long_for_a_narrow_dtype_decides_wherever_it_is(dtype: torch.dtype, where: int) -> None:
    weight = torch.randint(-128, 128, (2, 100_000), generator=torch.Generator().manual_seed(0)).to(dtype) / 64
    for value, narrowest in ((1.0, torch.bfloat16), (1 + 2**-10, torch.float16), (1 + 2**-20, dtype)):
        weight.view(-1)[where] = value
        held = weight.to(narrowest).view(-1).view(torch.uint8).numpy().tobytes()
        expected = xxhash.xxh3_128_hexdigest(f"{narrowest} (2, 100000);".encode() + held)
        assert xxh3(weight) == f"xxh3:{expected}"


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
        assert (gpu.waits(), gpu.bytes_read()) == (1, 5 * 16)
        assert texts == [str(one) for one in found] == read(found)
        assert gpu.waits() == 1
    assert texts[0] == xxh3(tensors()[0])
    assert all(map(is_fingerprint, texts[1:], (tensors()[0] + k for k in range(5))))


def test_a_sha256_has_no_prefix() -> None:
    assert kind_of(sha256(*tensors())) == SHA256 == ""
