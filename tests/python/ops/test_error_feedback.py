"""Codes by error feedback, and the sums of second moments, beside float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import one_weight
from pissa import ops
from pissa.ops._second_moment import DAMPING
from torch_settings import threads

OUT, IN, TOKENS = 96, 320, 900


def _inputs() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(TOKENS, IN, generator=generator) * torch.logspace(1, -1, IN)
    return spread @ torch.linalg.qr(torch.randn(IN, IN, generator=generator))[0]


X = _inputs()
MOMENT = X.mT @ X / TOKENS
WEIGHT = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))


def lost(weight: Tensor, other: Tensor, moment: Tensor = MOMENT) -> float:
    rest = weight.double() - other.double()
    return float((rest @ moment.double() * rest).sum())


def one_after_the_other(weight: Tensor, moment: Tensor, nearest: ops.QuantizedWeight) -> Tensor:
    """The definition, column by column in float64, on the elements that the scales of `nearest` allow."""
    bits = ops.formats.FORMATS[nearest.format].bits
    table = []  # the elements of every code at every place: [code, out, in]
    for code in range(2**bits):
        if bits == 8 and code == 128:  # -128, which no weight has
            continue
        stream = torch.tensor([code >> i & 1 for i in range(bits)], dtype=torch.uint8).repeat(8)
        group = (stream.view(bits, 8) << torch.arange(8)).sum(1).to(torch.uint8)  # eight codes, all the same
        table.append(ops.dequantize(nearest._replace(codes=group.repeat(nearest.codes.numel() // bits))))
    levels = torch.stack(table).double()
    damped = moment.double() + DAMPING * moment.double().diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    lower = torch.linalg.cholesky(damped)
    w, errors = weight.double(), torch.zeros(OUT, IN, dtype=torch.float64)
    for j in reversed(range(IN)):
        wanted = w[:, j] + errors @ lower[:, j] / lower[j, j]
        chosen = (levels[:, :, j] - wanted).abs().argmin(0)
        errors[:, j] = w[:, j] - levels[chosen, torch.arange(OUT), j]
    return w - errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_codes_lose_what_the_definition_loses(format: str, dtype: torch.dtype) -> None:
    """Ties are decided otherwise in float32, after which the codes of a row go apart; what they lose does not."""
    weight = WEIGHT.to(dtype)
    nearest, found = ops.quantize(weight, format), one_weight.quantize_with_feedback(weight, MOMENT, format)
    expected = lost(weight, one_after_the_other(weight, MOMENT, nearest))
    assert lost(weight, ops.dequantize(found)) == pytest.approx(expected, rel=0.01)
    assert expected < 0.35 * lost(weight, ops.dequantize(nearest))
    for part in ("absmax", "nested_absmax", "offset"):
        assert getattr(nearest, part) is None or torch.equal(getattr(nearest, part), getattr(found, part))


@pytest.mark.parametrize("moment", [torch.eye(IN), torch.zeros(IN, IN)])
def test_without_correlations_each_code_is_the_nearest(moment: Tensor) -> None:
    """With plain scales: those that are nested are not the ones that the nearest codes were found with."""
    found = ops.dequantize(one_weight.quantize_with_feedback(WEIGHT, moment, double_quant=False))
    nearest = ops.dequantize(ops.quantize(WEIGHT, double_quant=False))
    assert lost(WEIGHT, found, torch.eye(IN)) == pytest.approx(lost(WEIGHT, nearest, torch.eye(IN)), rel=1e-6)


def test_a_split_with_error_feedback_is_that_of_its_residual() -> None:
    """Of several weights, with shared moments, on any number of threads; and each alternation is no worse."""
    weights = [WEIGHT, WEIGHT.flip(0).bfloat16()]
    many = []
    for count in (1, 2):
        with threads(count):
            many.append(
                ops.split_many(
                    weights, [8, 8], [2.0, 1.0], form="nf4", second_moments=[MOMENT] * 2, error_feedback=True
                )
            )
    taken = [(part.a0, part.b0) for part in many[0]]
    again = ops.residual_many(
        weights, [a for a, _ in taken], [b for _, b in taken], [2.0, 1.0], form="nf4", second_moments=[MOMENT] * 2
    )
    for one, other, rest in zip(*many, again, strict=True):
        for residual in (other.residual, rest):
            assert isinstance(one.residual, ops.QuantizedWeight)
            assert isinstance(residual, ops.QuantizedWeight)
            assert all(torch.equal(a, b) for a, b in zip(one.residual[:4], residual[:4], strict=True) if a is not None)

    def error(t: int, feedback: bool) -> float:
        found = one_weight.split(
            WEIGHT, 8, form="nf4", quant_iters=t, quantise_first=True, second_moment=MOMENT, error_feedback=feedback
        )
        assert isinstance(found.residual, ops.QuantizedWeight)
        return lost(WEIGHT, ops.dequantize(found.residual) + found.b0 @ found.a0)

    assert error(3, True) <= error(1, True) < error(1, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_moments_are_summed(dtype: torch.dtype) -> None:
    """Within the bound of a sum of products in float32, on any number of threads; batches may have any shape."""
    x, sums = X.to(dtype).view(3, -1, IN), []
    for count in (1, 2):
        with threads(count):
            total = torch.zeros(IN, IN)
            for batch in x:
                ops.add_second_moment(total, batch)
            sums.append(total)
    assert torch.equal(*sums)
    exact = x.double().flatten(0, 1)
    bound = (TOKENS + 3) * 2**-24 * (exact.abs().mT @ exact.abs())
    assert ((sums[0] - exact.mT @ exact).abs() <= bound).tril().sum() == IN * (IN + 1) // 2


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="error_feedback: got True without second_moment"):
        one_weight.split(WEIGHT, 4, form="nf4", error_feedback=True)
    with pytest.raises(ValueError, match="form: got 'explicit' with error feedback; allowed: 'nf4', 'int8'"):
        one_weight.split(WEIGHT, 4, form="explicit", error_feedback=True, second_moment=MOMENT)
    with pytest.raises(ValueError, match="weight: got 319 columns; needed by error feedback in nf4: a multiple of 2"):
        one_weight.quantize_with_feedback(WEIGHT[:, 1:], MOMENT[1:, 1:])
    with pytest.raises(ValueError, match=r"second_moment of weight: got \[319, 319\] in torch.float32; needed"):
        one_weight.quantize_with_feedback(WEIGHT, MOMENT[1:, 1:])
    with pytest.raises(ValueError, match=r"total: got \[320, 319\]; needed: \[in, in\] = \[320, 320\]"):
        ops.add_second_moment(torch.zeros(IN, IN - 1), X)
