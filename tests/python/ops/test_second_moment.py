"""A split that weighs a weight's columns by the second moment of its inputs, beside eigenvectors in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import one_weight
from pissa import ops
from torch_settings import threads

OUT, IN, TOKENS = 192, 256, 600


def _inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, IN, generator=generator)
    outliers = torch.ones(IN)
    outliers[::50] = 100.0
    outliers[7] = 3000.0
    turn = torch.linalg.qr(torch.randn(IN, IN, generator=generator))[0]
    return {
        "noise": x,
        "outliers": x * outliers,
        "decaying": (x / torch.arange(1, IN + 1)) @ turn,
        "biased": x + 30 * torch.randn(IN, generator=generator),
        "few": x[:40],
        "none": torch.zeros(1, IN),
    }


def _weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(OUT, IN, generator=generator)
    u, _, vh = torch.linalg.svd(noise, full_matrices=False)
    return {
        "flat": noise,
        "power": u * torch.arange(1, OUT + 1) ** -0.45 @ vh,
        "steep": u * 0.8 ** torch.arange(OUT) @ vh,
        "identity": torch.eye(OUT, IN) + 0.01 * noise,
        "error": noise - ops.dequantize(ops.quantize(noise, "nf4")),
    }


INPUTS, WEIGHTS = _inputs(), _weights()


def moment_of(x: Tensor) -> Tensor:
    return x.mT @ x / len(x)


def lost(weight: Tensor, product: Tensor, moment: Tensor) -> float:
    """tr(M R Mᵀ) of what is left of the weight, in float64."""
    rest = weight.double() - product.double()
    return float((rest @ moment.double() * rest).sum())


@pytest.mark.parametrize("r", [1, 16, 128])
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_outputs_lose_no_more_than_they_must(inputs: str, kind: str, r: int) -> None:
    weight, moment = WEIGHTS[kind], moment_of(INPUTS[inputs])
    # Nearly equal singular values are the hardest: four passes more.
    part = one_weight.split(weight, r, scaling=2.0, second_moment=moment, passes=14 if kind == "identity" else "auto")
    values = torch.linalg.eigvalsh(weight.double() @ moment.double() @ weight.double().mT).clamp_min(0)
    # Beside the optimum, what products in float32 round off: eps of the largest part of the outputs.
    noise = 4 * torch.finfo(torch.float32).eps * float(values.sum())
    assert lost(weight, 2.0 * part.b0 @ part.a0, moment) <= (1 + 1e-4) * float(values[:-r].sum()) + noise


def test_the_moment_of_noise_is_no_weight() -> None:
    """With R = I the factors are those of the split without, up to what both lose."""
    weight = WEIGHTS["power"]
    plain, weighted = one_weight.split(weight, 16), one_weight.split(weight, 16, second_moment=5 * torch.eye(IN))
    difference = (plain.b0 @ plain.a0 - weighted.b0 @ weighted.a0).norm()
    assert difference <= 1e-4 * weight.norm()
    gram = weighted.a0 @ weighted.a0.mT, weighted.b0.mT @ weighted.b0  # balanced: both are S
    torch.testing.assert_close(*gram, atol=1e-5 * float(gram[0].max()), rtol=0)


def test_the_same_bits_for_any_number_of_threads_and_among_others() -> None:
    weights = [WEIGHTS[kind].bfloat16() for kind in ("flat", "power")]
    moments = [moment_of(INPUTS[inputs]) for inputs in ("biased", "outliers")]
    found = []
    for count in (1, 2):
        with threads(count):
            found.append(ops.split_many(weights, [8, 16], [1.0, 0.5], second_moments=moments))
            found.append(
                [
                    one_weight.split(weight, r, scaling=s, second_moment=moment)
                    for weight, r, s, moment in zip(weights, (8, 16), (1.0, 0.5), moments, strict=True)
                ]
            )
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert torch.equal(one.a0, same.a0)
            assert torch.equal(one.b0, same.b0)


@pytest.mark.parametrize("quantise_first", [True, False])
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_alternations_are_compared_by_the_outputs(form: str, quantise_first: bool) -> None:
    """Five lose no more of the outputs than one, and less than five without the moment."""
    weight, moment = WEIGHTS["flat"], moment_of(INPUTS["biased"])

    def error(t: int, second_moment: Tensor | None) -> float:
        found = one_weight.split(
            weight, 16, form=form, quant_iters=t, quantise_first=quantise_first, second_moment=second_moment
        )
        assert isinstance(found.residual, ops.QuantizedWeight)
        return lost(weight, ops.dequantize(found.residual) + found.b0 @ found.a0, moment)

    one, five = error(1, moment), error(5, moment)
    assert five <= one
    assert five < error(5, None)
    if quantise_first:  # the factors of the error take the bias, which is nearly all of it
        assert one < 0.1 * lost(weight, ops.dequantize(ops.quantize(weight, form)), moment)


@pytest.mark.parametrize(
    ("moment", "error"),
    [
        (torch.eye(IN - 1), r"second_moment of weight: got \[255, 255\] in torch.float32; needed: .* = \[256, 256\]"),
        (torch.eye(IN).double(), r"second_moment of weight: got \[256, 256\] in torch.float64; needed"),
        (None.__class__, r"second_moment of weight: got type; needed"),
        (torch.full((IN, IN), float("nan")), "second_moment of weight: contains NaN or Inf"),
    ],
)
def test_another_moment_is_refused(moment: object, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        one_weight.split(WEIGHTS["flat"], 4, second_moment=moment)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"second_moments: got 1; needed: one for each of the 2 weights"):
        ops.split_many([WEIGHTS["flat"]] * 2, [4, 4], [1.0, 1.0], second_moments=[torch.eye(IN)])
