"""Fingerprints of weights."""

from __future__ import annotations

import hashlib
import struct

import torch

from pissa.fingerprint import fingerprint


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
    digest = hashlib.sha256(b"torch.bfloat16 (3, 4);" + bfloat16).hexdigest()
    assert fingerprint(torch.tensor(values).reshape(3, 4)) == digest
