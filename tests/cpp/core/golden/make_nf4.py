"""Writes nf4.bin, the golden vectors of nf4_golden_test.cc, with bitsandbytes 0.50 on the CPU.

    python tests/cpp/core/golden/make_nf4.py        (needs torch and bitsandbytes; the tests need neither)

Inputs are not stored: both sides compute them from the case's numbers (`source` here, `source_of` in the
test). Little endian; for each case seven int32 (rows, cols, blocksize, dtype 0 f32 / 1 bf16 / 2 f16, fill,
nested, seed), then the codes, then absmax as float32, or, nested, as uint8 followed by nested_absmax float32
and offset float32.
"""

import struct
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOISE, ZEROS, ZERO_BLOCKS, TINY, ONE_SIZE = range(5)  # fill


def source(rows: int, cols: int, fill: int, blocksize: int, seed: int) -> torch.Tensor:
    """Cubed uniform numbers from an integer hash, every step exact or rounded once to float32."""
    index = np.arange(rows * cols, dtype=np.uint32)
    h = index * np.uint32(2654435761) + np.uint32(seed) * np.uint32(40503)
    h ^= h >> np.uint32(15)
    h *= np.uint32(2246822519)
    h ^= h >> np.uint32(13)
    u = (h >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    values = u * u * u
    if fill == ZEROS:
        values = np.zeros_like(values)
    elif fill == ZERO_BLOCKS:
        values[(index // blocksize) % 3 == 1] = 0
    elif fill == TINY:  # absmax around the smallest divisor, 1e-38, some of it denormal
        values = values * np.float32(2.0**-126)
    elif fill == ONE_SIZE:  # absmax all the same
        values = np.where(u < 0, np.float32(-0.75), np.float32(0.75))
    return torch.from_numpy(values).reshape(rows, cols)


def cases() -> list[tuple[int, int, int, int, int, int]]:
    """rows, cols, blocksize, dtype, fill, nested"""
    found = [
        (3, 5, 64, 0, NOISE, 0),
        (1, 1, 64, 0, NOISE, 0),
        (1, 129, 64, 0, NOISE, 0),
        (17, 1, 32, 0, NOISE, 0),
    ]
    for blocksize in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        rows = 2 * blocksize // 61 + 3  # two whole blocks and a short one, all crossing rows of 61
        found += [(rows, 61, blocksize, dtype, NOISE, 0) for dtype in (0, 1, 2)]
    found += [(64, 64, 256, 0, NOISE, 0), (20, 64, 64, 0, ZERO_BLOCKS, 0), (9, 37, 32, 1, ZERO_BLOCKS, 0)]
    found += [(5, 33, 64, 0, ZEROS, 0), (5, 33, 64, 0, TINY, 0), (8, 32, 64, 0, TINY, 0)]
    found += [
        (3, 5, 64, 0, NOISE, 1),
        (130, 65, 32, 0, NOISE, 1),
        (128, 64, 32, 0, NOISE, 1),
        (257, 32, 32, 0, NOISE, 1),
    ]
    found += [(150, 219, 64, 1, NOISE, 1), (100, 170, 32, 2, ZERO_BLOCKS, 1)]
    found += [(10, 64, 64, 0, ZEROS, 1), (10, 64, 64, 0, ONE_SIZE, 1), (9, 37, 64, 0, ONE_SIZE, 1)]
    return found


def main() -> None:
    out = bytearray()
    for seed, (rows, cols, blocksize, dtype, fill, nested) in enumerate(cases()):
        weight = source(rows, cols, fill, blocksize, seed).to(DTYPES[dtype])
        codes, state = bnb.quantize_4bit(
            weight, blocksize=blocksize, quant_type="nf4", compress_statistics=bool(nested)
        )
        out += struct.pack("<7i", rows, cols, blocksize, dtype, fill, nested, seed)
        out += codes.numpy().tobytes() + state.absmax.numpy().tobytes()
        if nested:
            out += state.state2.absmax.numpy().tobytes() + state.offset.numpy().tobytes()
    (Path(__file__).parent / "nf4.bin").write_bytes(out)


if __name__ == "__main__":
    main()
