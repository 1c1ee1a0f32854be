"""Alternations of decomposition and quantisation: ops.split_many with quant_iters, quantise_first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import one_weight
from cuda_stand_in import CudaStandIn
from devices import fetch, put
from pissa import ops
from reference import EPS, power_law

FORMS: list[dict[str, Any]] = [
    {"form": "nf4"},
    {"form": "nf4", "blocksize": 32, "double_quant": False},
    {"form": "int8"},
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL_OF_IT = {"passes": 8}
"""As many passes as the fast decompositions have, so that all are alike; of weights with at most 44 rows and r = 4 the
basis is then the whole space, and they are exact but for rounding."""


def weight(rows: int = 40, cols: int = 96, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return power_law(rows, cols, 0.4, seed).to(dtype)


def factors_of(matrix: Tensor, r: int) -> Tensor:
    """The best approximation of rank r, float64."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :r] * s[:r]) @ vh[:r]


def left(w: Tensor, split: ops.Split, scaling: float = 1.0) -> Tensor:
    """W - Q - s B0 A0, float64."""
    split = fetch(split)
    return w.double() - ops.dequantize(split.residual).double() - scaling * split.b0.double() @ split.a0.double()


def error(w: Tensor, split: ops.Split, scaling: float = 1.0) -> float:
    return left(w, split, scaling).norm().item()


def parts(split: ops.Split) -> list[Tensor]:
    rest = split.residual
    stored = [] if rest is None else [rest] if isinstance(rest, Tensor) else list(rest.tensors().values())
    return [split.a0, split.b0, *stored, *(split.taken or ())]


def same(one: ops.Split, other: ops.Split) -> bool:
    return all(torch.equal(*pair) for pair in zip(parts(one), parts(other), strict=True))


def exact_errors(w: Tensor, r: int, count: int, first: bool, form: dict[str, Any]) -> list[float]:
    """‖W - Q_t - L_t‖ of the iterates, by the definition, float64; what is quantised is float32."""
    w, found = w.double(), []
    best = torch.zeros_like(w) if first else factors_of(w, r)
    for _ in range(count):
        quantised = ops.quantize((w - best).float(), form["form"], **{k: v for k, v in form.items() if k != "form"})
        best = factors_of(w - ops.dequantize(quantised).double(), r)
        found.append((w - ops.dequantize(quantised).double() - best).norm().item())
    return found


# ---- What the iterates are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [False, True])
def test_the_result_is_an_iterate(form: dict[str, Any], dtype: torch.dtype, first: bool) -> None:
    """Its residual is that of what was taken, and its factors are the best of what is left of the weight."""
    w = weight(dtype=dtype)
    for count in (1, 2, 4) if first else (2, 4):
        split = one_weight.split(put(w), 4, scaling=0.5, quant_iters=count, quantise_first=first, tolerance=0, **form)
        assert isinstance(split.residual, ops.QuantizedWeight)
        assert split.taken is not None
        [again] = ops.residual_many([put(w)], *([factor] for factor in split.taken), [0.5], **form)
        assert isinstance(again, ops.QuantizedWeight)
        assert all(map(torch.equal, split.residual.tensors().values(), again.tensors().values()))
        lost = w.double() - ops.dequantize(fetch(split.residual)).double()
        least = torch.linalg.svdvals(lost)[4:].norm()
        # They are the best of the error rounded to its dtype, which is that far from the error, once for either; and
        # float32 products. A sum of squares of what is found is no larger than it may be by 1e-5 of it.
        assert error(w, split, 0.5) <= least + (2 * EPS[dtype] + 1e-5) * lost.norm()
        lengths = [split.a0.norm(dim=1), split.b0.norm(dim=0)]
        torch.testing.assert_close(*lengths, rtol=1e-4, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("svd", [{}, {"svd": "subspace"}])
def test_errors_are_those_of_exact_alternations(form: dict[str, Any], first: bool, svd: dict[str, str]) -> None:
    """Rounding may part the two, of which each still loses what the other does: 1%, while the second alternation gains
    more than 4%."""
    w = weight()
    expected = exact_errors(w, 4, 4, first, form)
    for count in range(1 if first else 2, 5):
        found = one_weight.split(put(w), 4, quant_iters=count, quantise_first=first, tolerance=0, **form, **svd)
        assert abs(error(w, found) / min(expected[:count]) - 1) < 0.01
    assert expected[1] < 0.96 * expected[0]


# ---- Which iterate is the result -------------------------------------------------------------------------------------


def test_the_best_iterate_is_kept_when_a_later_one_is_worse() -> None:
    kept = 0
    for seed in range(8):
        w = weight(24, 64, seed)
        splits = [
            fetch(one_weight.split(put(w), 8, form="nf4", quant_iters=t, tolerance=0, **ALL_OF_IT)) for t in range(2, 9)
        ]
        errors = [error(w, split) for split in splits]
        assert errors == sorted(errors, reverse=True)
        for before, split, after in zip(splits, splits[1:], splits[2:], strict=False):
            if same(before, split) or not same(split, after):
                continue  # not the last iterate, or bettered by the next one
            kept += 1
            [following] = ops.residual_many([w], [split.a0], [split.b0], [1.0], form="nf4")
            lost = w.double() - ops.dequantize(following).double()
            assert torch.linalg.svdvals(lost)[8:].norm() > error(w, split)
    assert kept > 0


@pytest.mark.cpu_only
def test_the_tolerance_ends_the_alternations_of_each_weight_by_itself() -> None:
    """Between the gains of two weights by the third alternation, it ends those of one of them."""
    weights = [weight(), power_law(40, 96, 1.5, 1).float()]

    def found(count: int, tolerance: float) -> list[ops.Split]:
        return ops.split_many(
            weights, [4, 4], [1.0, 1.0], form="nf4", quant_iters=count, tolerance=tolerance, **ALL_OF_IT
        )

    two, three, four = (found(count, 0) for count in (2, 3, 4))
    assert all(map(same, found(9, 0.8), two))  # nobody gains so much by the second
    gains = [1 - error(w, c) / error(w, b) for w, b, c in zip(weights, two, three, strict=True)]
    ended = found(4, sum(gains) / 2)
    slow = gains.index(min(gains))
    assert same(ended[slow], three[slow])
    assert same(ended[1 - slow], four[1 - slow])
    assert not any(map(same, three, four))


def test_factors_of_an_early_result_have_all_passes() -> None:
    """The alternations that a tolerance ends had few; what is left is decomposed again."""
    w = power_law(300, 400, 0.2)
    split = one_weight.split(put(w.float()), 16, form="nf4", quant_iters=50, tolerance=0.5)
    lost = w.float() - ops.dequantize(fetch(split.residual))
    again = fetch(one_weight.split(put(lost), 16))
    assert torch.equal(fetch(split.a0), again.a0)
    assert torch.equal(fetch(split.b0), again.b0)


# ---- Lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.cpu_only
@pytest.mark.parametrize("form", [{}, {"form": "explicit"}, *FORMS])
@pytest.mark.parametrize("how", [{"svd": "subspace"}, {"quant_iters": 3}, {"quant_iters": 2, "quantise_first": True}])
def test_many_weights_are_split_as_one_by_one(form: dict[str, Any], how: dict[str, Any]) -> None:
    if "quant_iters" in how and form.get("form") not in ops.formats.FORMATS:
        return
    weights = [weight(*[(40, 96), (96, 33)][i % 2], i, DTYPES[i % 3]) for i in range(6)]
    ranks, scalings = [4, 3, 1, 2, 4, 5], [1.0, 0.5, 2.0, 1.0, 0.25, 3.0]
    many = ops.split_many(put(weights), ranks, scalings, **form, **how)
    for w, r, scaling, split in zip(weights, ranks, scalings, many, strict=True):
        alone = one_weight.split(put(w), r, scaling=scaling, **form, **how)
        for mine, other in zip(parts(split), parts(alone), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)


@pytest.mark.cpu_only
@pytest.mark.parametrize("form", FORMS)
def test_the_host_waits_as_often_for_few_weights_as_for_many(form: dict[str, Any]) -> None:
    """Once for the weights, and twice for each alternation: for the largest elements of the errors, and for what is
    left of them. Besides, the decompositions wait in the core, for each shape."""
    for count in (2, 9):
        with CudaStandIn() as gpu:
            there = [gpu.put(weight(seed=i)) for i in range(count)]
            ops.split_many(there, [4] * count, [1.0] * count, **form, quant_iters=2, tolerance=0)
            assert len(gpu.reads) == 1 + 2 * 2


# ---- Weights that are out of the ordinary ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", [False, True])
def test_weights_of_any_rank_and_magnitude(form: dict[str, Any], first: bool) -> None:
    low = power_law(40, 3, 1.0) @ power_law(3, 96, 1.0)
    weights = {
        "zero": torch.zeros(40, 96),
        "rank 3": low,
        "one row": weight(1, 96),
        "constant": torch.full((40, 96), 0.5),
        "huge": weight() * 1e37,
        "tiny": weight() * 1e-33,
        "outlier": weight().index_fill(1, torch.tensor([5]), 100.0),
    }
    found = ops.split_many(
        [put(w.float()) for w in weights.values()],
        [1 if w.shape[0] == 1 else 4 for w in weights.values()],
        [1.0] * len(weights),
        quant_iters=3,
        quantise_first=first,
        names=list(weights),
        **form,
    )
    for (name, w), split in zip(weights.items(), found, strict=True):
        quantised = ops.quantize(w.float(), form["form"], **{k: v for k, v in form.items() if k != "form"})
        before = (w.double() - ops.dequantize(quantised).double()).norm()
        noise = 1e-5 * w.double().norm()
        assert all(part.isfinite().all() for part in parts(split)), name
        assert error(w, split) <= before + noise, name


def test_errors_name_the_weight_before_anything_is_decomposed() -> None:
    names = ["first", "second"]
    bad = weight().index_fill(0, torch.tensor([7]), float("nan"))
    with pytest.raises(ValueError, match=r"^second: contains NaN or Inf"):
        ops.split_many(put([weight(), bad]), [4, 4], [1.0, 1.0], form="nf4", quant_iters=2, names=names)
    large = torch.full((40, 96), 3e38)
    with pytest.raises(ValueError, match=r"^second: the mean of its scales overflows"):
        ops.split_many(
            put([weight(), large]), [4, 4], [1.0, 1.0], form="nf4", quant_iters=2, quantise_first=True, names=names
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_iters": 2}, r"^quant_iters: got 2 with form='implicit'; allowed: 1, or more with 'nf4', 'int8'"),
        ({"quant_iters": 2, "form": "explicit"}, r"^quant_iters: got 2 with form='explicit'"),
        ({"quant_iters": 0, "form": "nf4"}, r"^quant_iters: got 0; allowed: a whole number of at least 1"),
        ({"quant_iters": 2.0, "form": "nf4"}, r"^quant_iters: got 2.0"),
        ({"quant_iters": True, "form": "nf4"}, r"^quant_iters: got True"),
        ({"quantise_first": True}, r"^quantise_first: got True with form='implicit'; allowed: False, or with 'nf4'"),
        ({"tolerance": -0.1, "form": "nf4"}, r"^tolerance: got -0.1; allowed: a number of at least 0"),
        ({"tolerance": float("nan"), "form": "nf4"}, r"^tolerance: got nan"),
        ({"tolerance": "auto", "form": "nf4"}, r"^tolerance: got 'auto'"),
        ({"form": "int5"}, r"^form: got 'int5'"),
        ({"form": "int8", "blocksize": 64, "quant_iters": 2}, r"^blocksize: got 64"),
    ],
)
def test_bad_options_are_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        one_weight.split(put(weight()), 4, **change)


# ---- The op, and factors of rank 0 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 96), (3, 33), (1, 1), (70, 1100)])
def test_the_error_of_a_quantised_weight(form: dict[str, Any], dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Decoded in float32, subtracted there, and rounded once; and the squares of what that gives."""
    w = torch.randn(shape[::-1], generator=torch.Generator().manual_seed(1)).to(dtype).T
    q = ops.quantize(w, form["form"], **{k: v for k, v in form.items() if k != "form"})
    found = put(torch.full(shape, torch.nan, dtype=dtype))
    squares = fetch(torch.ops.pissa.quantization_error(put(w), *put(list(q[:5])), q.blocksize, found))
    expected = (w.float() - ops.dequantize(q)).to(dtype)
    assert torch.equal(fetch(found), expected)
    assert (squares.dtype, squares.shape) == (torch.float64, ())
    # Sums of n squares, in any order.
    torch.testing.assert_close(squares, expected.double().square().sum(), rtol=2 * w.numel() * 2.0**-53, atol=0)


@pytest.mark.parametrize(
    ("size", "error", "words"),
    [
        (97, torch.empty(40, 97), "codes: got 1920 elements; needed: 1940 bytes of uint8"),
        (96, torch.empty(40, 97), r"error: got shape \[40, 97\]; needed: \[40, 96\]"),
        (96, torch.empty(96, 40).mT, "error: needed a contiguous tensor"),
    ],
)
def test_the_error_of_another_weight_is_refused(size: int, error: Tensor, words: str) -> None:
    q = ops.quantize(put(weight()))
    with pytest.raises((ValueError, RuntimeError), match=words):
        torch.ops.pissa.quantization_error(put(weight(40, size)), *q[:5], q.blocksize, put(error))


@pytest.mark.parametrize("form", [{"form": "explicit"}, *FORMS])
def test_a_residual_without_factors_is_the_weight(form: dict[str, Any]) -> None:
    w = put(weight(dtype=torch.bfloat16))
    [found] = ops.residual_many([w], [put(torch.empty(0, 96))], [put(torch.empty(40, 0))], [1.0], **form)
    if form["form"] == "explicit":
        assert torch.equal(found, w)
        assert found.data_ptr() != w.data_ptr()
    else:
        expected = ops.quantize(w, form["form"], **{k: v for k, v in form.items() if k != "form"})
        assert all(map(torch.equal, found.tensors().values(), expected.tensors().values()))
