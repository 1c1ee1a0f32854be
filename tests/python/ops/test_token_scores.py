"""ops.token_scores against float64, their gradients, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from devices import fetch, put
from pissa import ops
from reference import EPS

WEIGHTS: dict[str, dict[str, Any]] = {"dense": {}, "nf4": {}, "int8": {"format": "int8"}, "mxfp4": {"format": "mxfp4"}}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS, INNER, VOCABULARY = 40, 64, 200


def case(weight: str, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Any, Tensor, Tensor, Tensor]:
    """x, the weight, the weight in float64, a bias, and labels of which a third does not count."""
    generator = torch.Generator().manual_seed(seed)
    dense = put((torch.randn(VOCABULARY, INNER, generator=generator) / 4).to(dtype))
    held = dense if weight == "dense" else ops.quantize(dense, **WEIGHTS[weight])
    exact = dense if weight == "dense" else ops.dequantize(held)
    x = put(torch.randn(4, TOKENS // 4, INNER, generator=generator).to(dtype)).requires_grad_()
    bias = put(torch.randn(VOCABULARY, generator=generator))
    labels = torch.randint(VOCABULARY, (4, TOKENS // 4), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    return x, held, fetch(exact).double(), bias, put(labels)


def exact_logits(x: Tensor, weight: Tensor, bias: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits = scale * functional.linear(x, weight, fetch(bias).double())
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@pytest.mark.parametrize("softcap", [None, 10.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_against_float64(weight: str, dtype: torch.dtype, softcap: float | None) -> None:
    """A logit is off by what its product is: roundings of both factors to the dtype, and of the sum. Twice that is the
    most that a logarithm of p is off, and p by that in proportion."""
    x, held, exact, bias, labels = case(weight, dtype)
    scale = 0.5
    found = ops.token_scores(x, held, labels, bias=bias, scale=scale, softcap=softcap)
    weights = torch.randn(labels.shape, generator=torch.Generator().manual_seed(1))
    (found.log_probs * put(weights)).sum().backward()

    x64, targets = fetch(x.detach()).double().requires_grad_(), fetch(labels)
    counted = targets != -100
    z = exact_logits(x64, exact, bias, scale, softcap)
    log_p = torch.log_softmax(z, -1)
    expected = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0].masked_fill(~counted, 0)
    (expected * weights).sum().backward()
    p, log_p, z = (tensor.detach() for tensor in (log_p.exp(), log_p, z))

    size = functional.linear(x64.detach().abs(), exact.abs(), fetch(bias).double().abs()).max().item() * scale
    eps = EPS[dtype]
    off = (2 * eps + (INNER + 40) * EPS[torch.float32]) * size + 80 * EPS[torch.float32]
    assert (fetch(found.log_probs.detach()) - expected.detach()).abs().max() <= 2 * off
    entropy = -(p * log_p).sum(-1).masked_fill(~counted, 0)
    assert (fetch(found.entropy) - entropy).abs().max() <= 2 * off * (1 - log_p.min().item())
    squares = log_p.mul(2).logsumexp(-1).masked_fill(~counted, 0)
    assert (fetch(found.log_sum_sq_probs) - squares).abs().max() <= 4 * off
    assert (fetch(found.mean_logits) - z.mean(-1).masked_fill(~counted, 0)).abs().max() <= off
    is_top1 = fetch(found.is_top1)
    margin = z.gather(-1, targets.clamp(min=0)[..., None])[..., 0] - z.amax(-1)
    assert bool(is_top1[(margin == 0) & counted & (z.topk(2).values.diff().abs()[..., 0] > 2 * off)].all())
    assert not bool(is_top1[(margin < -2 * off) | ~counted].any())

    assert x.grad is not None
    assert x64.grad is not None
    one_hot = functional.one_hot(targets.clamp(min=0), VOCABULARY).double()
    reach = (weights.abs()[..., None] * scale * (p + one_hot)) @ exact.abs()
    allowed = (4 * off + 4 * eps + (VOCABULARY + 40) * EPS[torch.float32]) * reach
    assert bool(((fetch(x.grad).double() - x64.grad).abs() <= allowed).all())
    assert not fetch(x.grad)[~counted].any()


def test_no_label_counts() -> None:
    x, weight, *_, labels = case("dense", torch.float32)
    nothing = torch.full_like(labels, -100)
    log_probs = ops.token_scores(x, weight, nothing).log_probs
    assert not log_probs.any()
    log_probs.sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_only_log_probs_have_a_gradient() -> None:
    x, weight, *_, labels = case("dense", torch.float32)
    found = ops.token_scores(x, weight, labels)
    assert [score.requires_grad for score in found] == [True, False, False, False, False]
    with torch.no_grad():
        again = ops.token_scores(x, weight, labels)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": torch.zeros(4, 10)}, "labels: got torch.float32"),
        ({"labels": torch.zeros(4, 9, dtype=torch.int64)}, r"labels: got torch.int64 of shape \[4, 9\]"),
        ({"labels": torch.full((4, 10), 200)}, "labels: got 200 to 200; allowed: 0 to 199, and -100"),
        ({"labels": torch.full((4, 10), -1)}, "labels: got -1 to -1;"),
        ({"scale": float("nan")}, "scale: got nan"),
        ({"softcap": 0.0}, "softcap: got 0.0"),
        ({"weight": torch.zeros(200, 63)}, "x: got shape"),
        ({"bias": torch.zeros(3)}, "bias: got shape"),
        ({"weight": torch.zeros(200, 64, requires_grad=True)}, "weight"),
    ],
)
def test_what_is_refused(changed: dict[str, Any], message: str) -> None:
    x, weight, *_, labels = case("dense", torch.float32)
    given: dict[str, Any] = {"weight": weight, "labels": labels} | {
        name: put(value) if isinstance(value, Tensor) and not value.requires_grad else value
        for name, value in changed.items()
    }
    if changed.get("labels") is not None and x.is_cuda and "allowed: 0" in message:
        pytest.skip("labels on a GPU are not looked at: they would be waited for")
    with pytest.raises((TypeError, ValueError), match=message):
        ops.token_scores(x, **given)
