"""Residuals of many weights: those of each, one wait for a GPU, errors that name the weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_stand_in import CudaStandIn
from devices import put
from pissa import ops

pytestmark = pytest.mark.cpu_only
FORMS: list[dict[str, Any]] = [
    {},
    {"form": "nf4"},
    {"form": "nf4", "double_quant": False},
    {"form": "int8"},
]
SCALINGS = [1.0, 0.5, 2.0]


def given() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return put(torch.randn(shape, generator=generator))

    shapes, ranks = [(40, 64), (96, 33), (40, 64)], [3, 5, 1]
    weights = [randn(*shape) for shape in shapes]
    weights[1] = weights[1].bfloat16()
    a0s = [randn(r, shape[1]) for r, shape in zip(ranks, shapes, strict=True)]
    return weights, a0s, [randn(shape[0], r) for r, shape in zip(ranks, shapes, strict=True)]


def parts(residual: Any) -> list[Tensor]:
    return [residual] if isinstance(residual, Tensor) else list(residual.tensors().values())


@pytest.mark.parametrize("fields", FORMS)
def test_each_is_the_residual_of_its_weight_and_the_host_waits_once(fields: dict[str, Any]) -> None:
    with CudaStandIn() as gpu:
        there = [[gpu.put(tensor) for tensor in tensors] for tensors in given()]
        found = ops.residual_many(*there, SCALINGS, **fields)
        assert len(gpu.reads) == 1
        ops.residual_many(*(tensors[:1] for tensors in there), [1.0], **fields)
        assert len(gpu.reads) == 2
        found = [[gpu.fetch(part) for part in parts(residual)] for residual in found]
    for got, weight, a0, b0, scaling in zip(found, *given(), SCALINGS, strict=True):
        want = parts(ops.residual_many([weight], [a0], [b0], [scaling], **fields)[0])
        assert len(got) == len(want)
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("fields", FORMS)
def test_layouts_do_not_matter(fields: dict[str, Any]) -> None:
    strided = [[tensor.mT.contiguous().mT for tensor in tensors] for tensors in given()]
    assert not any(tensors[0].is_contiguous() for tensors in strided)
    found, wanted = (ops.residual_many(*tensors, SCALINGS, **fields) for tensors in (strided, given()))
    for got, want in zip(found, wanted, strict=True):
        assert all(map(torch.equal, parts(got), parts(want)))


@pytest.mark.parametrize("fields", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_errors_name_the_weight(fields: dict[str, Any], value: float) -> None:
    for which, words in enumerate((r"^second: contains NaN or Inf", r"^a0 of second, b0 of second: contain NaN")):
        tensors = given()
        tensors[which][1][2, 1] = value
        with pytest.raises(ValueError, match=words):
            ops.residual_many(*tensors, SCALINGS, names=["first", "second", "third"], **fields)


def test_scales_whose_mean_overflows_name_the_weight() -> None:
    weights, a0s, b0s = given()
    weights[2] = torch.full_like(weights[2], 3e38)
    with pytest.raises(ValueError, match=r"^third: the mean of its scales overflows"):
        ops.residual_many(
            weights, [0 * a0 for a0 in a0s], b0s, SCALINGS, form="nf4", names=["first", "second", "third"]
        )
    with pytest.raises(ValueError, match=r"^split: the mean of its scales overflows"):
        ops.split_many([1e38 * weights[0].sign()], [4], [1.0], form="nf4", names=["split"])


def test_arguments_of_other_lengths_are_refused() -> None:
    weights, a0s, b0s = given()
    with pytest.raises(ValueError, match=r"^scalings: got 2; needed: one for each of the 3 weights"):
        ops.residual_many(weights, a0s, b0s, SCALINGS[:2])
    assert ops.residual_many([], [], [], []) == []
