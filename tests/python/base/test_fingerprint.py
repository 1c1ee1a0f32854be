"""Fingerprints of weights."""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch
import xxhash

from pissa.base.fingerprint import fingerprint, sha256


def test_fingerprints_tell_values_apart_and_dtypes_not() -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    rounded = weight.bfloat16()
    assert fingerprint(rounded) == fingerprint(rounded.float()) == fingerprint(rounded.float().half().float())
    assert fingerprint(weight.half()) == fingerprint(weight.half().float())
    assert fingerprint(weight) != fingerprint(rounded)
    assert fingerprint(weight) != fingerprint(weight.T)
    assert fingerprint(weight) == fingerprint(weight.T.contiguous().T)
    changed = weight.clone()
    changed.view(torch.int32)[5, 4] ^= 1
    assert fingerprint(weight) != fingerprint(changed)
    assert fingerprint(weight) == fingerprint(weight.clone())
    assert len({fingerprint(torch.zeros(shape)) for shape in [(2, 3), (3, 2), (6,)]}) == 3


def test_fingerprint_is_the_same_on_every_machine() -> None:
    values = [k / 8 for k in range(12)]
    bfloat16 = b"".join(struct.pack("<f", value)[2:] for value in values)
    hashed = b"torch.bfloat16 (3, 4);" + bfloat16
    tensor = torch.tensor(values).reshape(3, 4)
    assert sha256(tensor) == hashlib.sha256(hashed).hexdigest()
    assert fingerprint(tensor) == f"xxh3:{xxhash.xxh3_128_hexdigest(hashed)}" == "xxh3:68577c773a89b2cbef6d14097043ba91"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", [0, 70_000, 199_999])
def test_one_value_too_long_for_a_narrow_dtype_decides_wherever_it_is(dtype: torch.dtype, where: int) -> None:
    weight = torch.randint(-128, 128, (2, 100_000), generator=torch.Generator().manual_seed(0)).to(dtype) / 64
    for value, narrowest in ((1.0, torch.bfloat16), (1 + 2**-10, torch.float16), (1 + 2**-20, dtype)):
        weight.view(-1)[where] = value
        held = weight.to(narrowest).view(-1).view(torch.uint8).numpy().tobytes()
        expected = xxhash.xxh3_128_hexdigest(f"{narrowest} (2, 100000);".encode() + held)
        assert fingerprint(weight) == f"xxh3:{expected}"
