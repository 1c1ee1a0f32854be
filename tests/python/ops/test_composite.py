"""The ops in PyTorch's operations, against the kernels, on the CPU and on a device for which there is no kernel.
`make test` also runs all tests of the ops on them, by PISSA_COMPOSITE=1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from pissa import ops
from pissa.ops import _decode, composite
from pissa.ops.formats import FORMATS, READ
from torch_settings import default_dtype

pytestmark = pytest.mark.cpu_only


def weight_in(format: str, rows: int, cols: int) -> ops.QuantizedWeight:
    """A random weight; of a format that is only read, random bytes, whose scales may be anything."""
    if format in FORMATS:
        return ops.quantize(torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)), format)
    row = READ[format]
    size = rows * cols // row.usual_blocksize * row.block_bytes
    codes = torch.from_numpy(numpy.random.default_rng(rows).integers(0, 256, size, dtype=numpy.uint8))
    return ops.QuantizedWeight(
        codes, torch.empty(0, dtype=torch.uint8), None, None, format, (rows, cols), row.usual_blocksize
    )


def held(weight: ops.QuantizedWeight) -> list[Any]:
    *parts, shape, blocksize = weight
    return [*parts, blocksize, *shape]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two float32 tensors are equal in every bit, but for the kind of NaN."""
    return torch.equal(one.nan_to_num(1.5).view(torch.int32), other.nan_to_num(1.5).view(torch.int32))


# One chunk, and several, of rows that begin with a block and of rows whose blocks cross them.
@pytest.mark.parametrize("chunk", [composite._CHUNK, 4096])
@pytest.mark.parametrize(("rows", "cols"), [(37, 512), (70, 96), (13, 37), (5, 4096)])
@pytest.mark.parametrize("format", READ)
def test_codes_become_the_kernels_bits(
    format: str, rows: int, cols: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = READ[format]
    if row.scales in ("e8m0", "e4m3", "bfloat16", "within") and cols % row.usual_blocksize:
        return
    monkeypatch.setattr(composite, "_CHUNK", chunk)
    weight = weight_in(format, rows, cols)
    expected = ops.dequantize(weight)
    assert same_bits(composite._dequantize(*held(weight), torch.float32), expected)
    for indices in (torch.tensor([[0, rows - 1], [3, 3]]), torch.empty(2, 0, dtype=torch.int64)):
        assert same_bits(composite._dequantize_rows(*held(weight), indices, torch.float32), expected[indices])
    outside = composite._dequantize_rows(*held(weight), torch.tensor([-1, rows]), torch.float32)
    assert same_bits(outside, expected[[0, 0]])  # as on a GPU


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(("tall", "wide"), [(1, 32), (128, 128), (1, 200)])
def test_tiles_of_fp8(tall: int, wide: int, scales: torch.dtype) -> None:
    weight = ops.quantize(torch.randn(300, 200, generator=torch.Generator().manual_seed(0)), "fp8")
    shape = (-(-300 // tall), -(-200 // wide))
    absmax = torch.arange(1, 1 + shape[0] * shape[1]).fmod(90).add(60).to(scales)
    weight = weight._replace(absmax=absmax, blocksize=wide)
    assert same_bits(composite._dequantize(*held(weight), torch.float32), ops.dequantize(weight))


def test_tables_are_float32_whatever_torch_takes_by_default() -> None:
    weight = weight_in("nf4", 8, 64)
    _decode._table.cache_clear()
    _decode._levels_of_bytes.cache_clear()
    with default_dtype(torch.bfloat16):
        found = composite._dequantize(*held(weight), torch.float32)
    assert same_bits(found, ops.dequantize(weight))


def test_an_unknown_label_gives_nan() -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    scores, dx = composite._token_scores(x, weight, None, torch.tensor([1, 5, -1]), 1.0, 0.0, True)
    assert scores[:, 0].isnan().tolist() == dx.isnan().all(1).tolist() == [False, True, True]
    assert not dx[0].isnan().any()


def _environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PISSA_COMPOSITE"} | more


def test_a_device_without_kernels() -> None:
    script = Path(__file__).parents[1] / "support" / "other_device_checks.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=_environment())
    assert len(run.stdout.split()) == 3, run.stderr


def test_it_can_be_forced() -> None:
    code = (
        "import torch, pissa; from pissa import ops; print(ops.linear(torch.ones(2, 4), torch.ones(3, 4)).sum().item())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=_environment(PISSA_COMPOSITE="1")
    )
    assert run.stdout == "24.0\n", run.stderr
    assert "on cpu PyTorch's operations compute pissa's layers (PISSA_COMPOSITE=1 is set)" in run.stderr
