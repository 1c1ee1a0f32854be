"""A change rounded into codes: each element by its definition in float64, from the elements that its block can hold;
what is counted; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.compare.gguf_blocks import random_blocks, weight_of
from devices import fetch, put
from pissa import ops
from pissa.ops import QuantizedWeight, merge_codes
from pissa.ops.formats import READ
from torch_settings import threads

FORMAT = pytest.mark.parametrize("format", READ)
ROWS, COLS = 4, 512


def weight_in(format: str, rows: int = ROWS, cols: int = COLS) -> QuantizedWeight:
    if READ[format].is_read_only:
        weight = weight_of(random_blocks(format, rows, cols), format)
        return (
            weight._replace(codes=torch.where(weight.codes == 128, 127, weight.codes)) if format == "q8_0" else weight
        )
    return ops.quantize(torch.randn(rows, cols, generator=torch.Generator().manual_seed(1)), format)


def factors(rows: int = ROWS, cols: int = COLS, size: float = 1.0, r: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(r, cols, generator=generator), size * torch.randn(rows, r, generator=generator)


def elements_of(weight: QuantizedWeight) -> Tensor:
    """float64 [draws, out, in], ascending: for each place all elements that its block can hold, but for -128 of signed
    bytes, which nobody writes. A code is missing from the draws with probability e^-30."""
    generator, bits = torch.Generator().manual_seed(3), READ[weight.format].bits
    draws: list[Tensor | int] = [code for code in range(256) if code not in _UNUSED.get(weight.format, (128,))]
    if bits < 8:
        shape = weight.codes.shape
        draws = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(30 << bits)]
    changed = (torch.zeros_like(weight.codes) + draw for draw in draws)
    found = [ops.dequantize(weight._replace(codes=_with_scales(weight, codes))).double() for codes in changed]
    return torch.stack(found).sort(0).values


_UNUSED = {"fp8": (127, 255)}


def _with_scales(weight: QuantizedWeight, codes: Tensor) -> Tensor:
    """Random codes with the scales of GGUF's blocks, where these lie."""
    scales = {"q4_0": [(0, 2)], "q4_1": [(0, 4)], "q5_0": [(0, 2)], "q5_1": [(0, 4)], "q8_0": [(0, 2)]}
    scales |= {"q2_k": [(0, 16), (80, 84)], "q3_k": [(96, 110)], "q4_k": [(0, 16)], "q5_k": [(0, 16)]}
    scales |= {"q6_k": [(192, 210)], "iq4_nl": [(0, 2)], "iq4_xs": [(0, 8)], "mxfp4_gguf": [(0, 1)]}
    blocks, old = (part.view(-1, READ[weight.format].block_bytes or part.numel()) for part in (codes, weight.codes))
    for begin, end in scales.get(weight.format, []):
        blocks[:, begin:end] = old[:, begin:end]
    return codes


@FORMAT
def test_nearest_is_nearest(format: str) -> None:
    weight, (a, b) = weight_in(format), factors(size=0.2)
    total = ops.dequantize(weight).double() + b.double() @ a.double()
    held = elements_of(weight)
    new = ops.dequantize(merge_codes(weight, a, b, rounding="nearest").weight).double()
    least = (held - total).abs().amin(0)
    assert ((new - total).abs() <= least + 1e-5 * (total.abs() + 1)).all()


@FORMAT
def test_what_is_counted(format: str) -> None:
    weight, (a, b) = put(weight_in(format)), factors(size=0.1)
    merged = merge_codes(weight, put(a), put(b), 0.5, seed=9)
    assert merged.weight._replace(codes=weight.codes) == weight
    moved = fetch(ops.dequantize(merged.weight)).double() - fetch(ops.dequantize(weight)).double()
    change = 0.5 * b.double() @ a.double()
    # Elements and changes are rounded to float32 here, the sums are not.
    sums = {"change": change * change, "along": moved * change, "square": moved * moved}
    for name, terms in sums.items():
        assert abs(getattr(merged, name) - float(terms.sum())) <= 1e-4 * float(terms.abs().sum())
    assert merged.moved == int((moved != 0).sum()) > 0


@FORMAT
@pytest.mark.parametrize("rounding", ["nearest", "dither"])
def test_with_a_second_moment_outputs_lose_less(format: str, rounding: str) -> None:
    """Inputs of which a few directions have most of the variance, and the loss tr(D R Dᵀ) of what is lacking, D. At
    random, a loss is a sum over 64 rows, of which each spreads by about its size."""
    rows = 64
    weight, (a, b) = weight_in(format, rows), factors(rows, size=0.02 if format in ("int8", "fp8") else 0.05)
    if READ[format].is_read_only:
        b = b * 0.1
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2000, 8, generator=generator) @ torch.randn(8, COLS, generator=generator)
    moment = (x + torch.randn(2000, COLS, generator=generator)).double()
    moment = moment.mT @ moment / 2000
    change, old, losses = b.double() @ a.double(), ops.dequantize(weight).double(), []
    for second_moment in (None, put(moment.float())):
        merged = merge_codes(put(weight), put(a), put(b), rounding=rounding, second_moment=second_moment, seed=7)
        lacking = change - (fetch(ops.dequantize(merged.weight)).double() - old)
        losses.append(float((lacking @ moment * lacking).sum()))
        assert merged.along == pytest.approx(float((change * (change - lacking)).sum()), rel=1e-3)
    assert losses[1] < losses[0]


def test_nothing_changes_nothing() -> None:
    for format in READ:
        weight, (a, b) = weight_in(format), factors()
        for merged in (merge_codes(weight, a, 0 * b), merge_codes(weight, a, b, 0.0)):
            assert torch.equal(merged.weight.codes, weight.codes)
            assert merged[2:] == (0.0, 0.0, 0, 0)


def test_seeds_and_threads() -> None:
    weight, (a, b) = weight_in("nf4", 300, 640), factors(300, 640, 0.01)
    codes = [merge_codes(weight, a, b, seed=seed).weight.codes for seed in (0, 1, 2**63 - 1)]
    assert not torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])
    with threads(1):
        assert torch.equal(merge_codes(weight, a, b, seed=1).weight.codes, codes[1])


@pytest.mark.parametrize("scale", [0.0, float("inf"), float("nan"), 1e-45])
def test_elements_without_a_usable_scale_stay(scale: float) -> None:
    weight, (a, b) = weight_in("int8"), factors(size=1e3)
    absmax = weight.absmax.clone()
    absmax[2] = scale
    weight = weight._replace(absmax=absmax)
    old, new = (part.view(ROWS, COLS) for part in (weight.codes, merge_codes(weight, a, b).weight.codes))
    assert torch.equal(new[2], old[2])
    assert not torch.equal(new[3], old[3])


def test_beyond_the_last_level() -> None:
    weight = ops.quantize(torch.full((2, 64), 3.0), "int4")
    a, b = torch.ones(1, 64), torch.tensor([[1.0], [-1.0]])
    merged = merge_codes(weight, a, b)
    assert merged.beyond == 64
    assert torch.equal(ops.dequantize(merged.weight)[0], ops.dequantize(weight)[0])
    changed = merge_codes(weight, torch.full((1, 64), torch.inf), b)
    assert changed.beyond == 128
    assert torch.equal(merge_codes(weight, torch.full((1, 64), torch.nan), b).weight.codes, weight.codes)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": torch.ones(2, 2)}, TypeError, "weight: got Tensor"),
        ({"a": torch.ones(3, 5)}, ValueError, r"a: .*\[r >= 1, 512\]"),
        ({"b": torch.ones(4, 4)}, ValueError, r"b: .*\[4, 3\]"),
        ({"scaling": float("nan")}, ValueError, "scaling: got nan"),
        ({"second_moment": torch.ones(4, 4)}, ValueError, r"second_moment of weight: .*\[512, 512\]"),
        ({"rounding": "up"}, ValueError, "rounding: got 'up'; allowed: 'dither', 'nearest'"),
        ({"seed": -1}, ValueError, "seed: got -1; allowed"),
        ({"seed": 0.5}, ValueError, "seed: got 0.5; allowed"),
    ],
)
def test_what_is_refused(change: dict[str, Any], error: type[Exception], words: str) -> None:
    a, b = factors()
    with pytest.raises(error, match=words):
        merge_codes(**{"weight": weight_in("nf4"), "a": a, "b": b, **change})
