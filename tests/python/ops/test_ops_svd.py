"""ops.svd_lowrank, ops.split_many, ops.residual_many: quality, determinism, every kind of matrix, refusals."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from runpy import run_path

import pytest
import torch
from torch import Tensor

import one_weight
from devices import fetch, put
from pissa import notices, ops
from pissa.ops import _load
from reference import EPS, energy_loss, power_law
from torch_settings import threads

DTYPE_OF = {"krylov": torch.float32, "subspace": torch.bfloat16}
U32 = EPS[torch.float32]


def _matrices() -> dict[str, Tensor]:
    """Some of the classes on which tests/cpp/core/svd_test.cc tries every format and number of passes."""
    torch.manual_seed(0)
    return {
        "flat": torch.randn(96, 160).double(),
        "power law": power_law(120, 80, 1.0),
        "rank 3": torch.randn(90, 3).double() @ torch.randn(3, 60).double(),
        "zero": torch.zeros(40, 70).double(),
        "one row": torch.randn(1, 30).double(),
    }


def _orthogonality(q: Tensor) -> float:
    return (q.double().T @ q.double() - torch.eye(q.shape[1])).norm().item()


@pytest.mark.parametrize("svd", DTYPE_OF)
@pytest.mark.parametrize("kind", list(_matrices()))
def test_factors_are_orthonormal_and_best(kind: str, svd: str) -> None:
    weight = _matrices()[kind].to(DTYPE_OF[svd])
    r = min(12, *weight.shape)
    u, s, v = fetch(ops.svd_lowrank(put(weight), r, svd=svd, passes=12))
    assert (u.shape, s.shape, v.shape) == ((weight.shape[0], r), (r,), (weight.shape[1], r))
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in (u, s, v))
    assert (s >= 0).all()
    assert (s.diff() <= 0).all()
    # CholeskyQR2 and Householder leave a few u per entry; 32 u sqrt(r) is 4 times the largest value seen.
    assert _orthogonality(u) <= 32 * U32 * r**0.5
    assert _orthogonality(v) <= 32 * U32 * r**0.5
    exact = torch.linalg.svdvals(weight.double())
    if exact[0] == 0:
        assert (s == 0).all()
        return
    # Ritz values never exceed the singular values; float32 products perturb them by a few u sigma_1 sqrt(k).
    noise = 16 * U32 * max(weight.shape) ** 0.5 * exact[0]
    assert (s.double() <= exact[:r] + noise).all()
    # Twelve passes find everything but the flat spectrum by subspace iteration, which has no gap to work with.
    loss = 2e-2 if svd == "subspace" and kind == "flat" else 1e-4
    assert energy_loss(weight, v) <= loss
    # U diag(S) V^T projects the weight: no worse than the best rank-r approximation by more than the energy lost.
    rest = (weight.double() - (u.double() * s.double()) @ v.double().T).norm()
    best = exact[r:].norm()
    lost = loss * exact[:r].square().sum()
    assert rest <= (best.square() + lost).sqrt() + noise * r**0.5


def test_auto_follows_the_rank_of_each_weight() -> None:
    ranks = {64: 10, 65: 12, 97: 14}
    weight = put(torch.randn(520, 500))
    many = ops.split_many([weight] * len(ranks), list(ranks), [1.0] * len(ranks), passes="auto")
    for (r, passes), auto in zip(ranks.items(), many, strict=True):
        given = ops.split_many([weight], [r], [1.0], passes=passes)[0]
        assert all(torch.equal(a, b) for a, b in zip(auto[:2], given[:2], strict=True))
        auto, given = ops.svd_lowrank(weight, r), ops.svd_lowrank(weight, r, passes=passes)
        assert all(torch.equal(a, b) for a, b in zip(auto[:2], given[:2], strict=True))
    auto, given = (ops.svd_lowrank(weight, 4, svd="subspace", **passes) for passes in ({}, {"passes": 28}))
    assert all(torch.equal(a, b) for a, b in zip(auto, given, strict=True))


@pytest.mark.parametrize("svd", ["krylov", "subspace"])
def test_fewer_passes_lose_more(svd: str) -> None:
    weight = power_law(384, 512, 0.2).float()
    two = ops.svd_lowrank(put(weight), 8, svd=svd, passes=2)[2]
    assert energy_loss(weight, two) > 10 * energy_loss(weight, ops.svd_lowrank(put(weight), 8, svd=svd)[2])
    split = one_weight.split(put(weight), 8, svd=svd, passes=2, form="nf4")
    for a0 in (split.a0, one_weight.split(put(weight), 8, svd=svd, passes=2).a0):
        torch.testing.assert_close(fetch(a0) / fetch(a0).norm(dim=1, keepdim=True), fetch(two).T)


@pytest.mark.cpu_only
def test_seed_decides_and_threads_do_not() -> None:
    weight = power_law(200, 300, 0.3).bfloat16()
    with threads(1):
        one = ops.svd_lowrank(weight, 16, seed=5)
    with threads(3):
        three = ops.svd_lowrank(weight, 16, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    torch.manual_seed(123)
    assert torch.equal(one[0], ops.svd_lowrank(weight, 16, seed=5)[0])
    assert not torch.equal(one[0], ops.svd_lowrank(weight, 16, seed=6)[0])


def _run(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    """PISSA_ISA is read once, when the library is first used: each instruction set needs its own process."""
    environment = os.environ | {"PISSA_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.nightly
@pytest.mark.cpu_only
def test_faster_instruction_sets_say_why_they_are_not_used() -> None:
    run = _run("from pissa import ops; print(*ops.build_info()['isas_unused'], sep='\\n')", "baseline")
    reasons = dict(line.split(": ") for line in run.stdout.splitlines())
    for isa in ops.build_info()["isas_available"][1:]:
        assert reasons.pop(isa) == "PISSA_ISA is baseline"
    assert all("lacks" in reason or "permit" in reason for reason in reasons.values()), reasons


@pytest.mark.cpu_only
def test_a_failed_self_test_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which C++ has planted and fallen back from in tests/cpp/cpu/choice_test.cc."""
    monkeypatch.setattr(_load._C, "isa_failure", lambda: "amxbf16 multiplies wrongly")
    with pytest.warns(notices.InstructionSetWarning, match=r"^amxbf16 multiplies wrongly; .*`pissa env`") as warned:
        run_path(_load.__file__)
    assert len(warned) == 1


# ---- Split -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("svd", DTYPE_OF)
@pytest.mark.parametrize("scaling", [0.5, 1.0, 4.0])
def test_split_is_the_scaled_svd(scaling: float, svd: str) -> None:
    weight = power_law(96, 130, 0.7).float()
    u, s, v = fetch(ops.svd_lowrank(put(weight), 8, svd=svd))
    a0, b0, residual, _ = fetch(one_weight.split(put(weight), 8, scaling=scaling, svd=svd))
    assert residual is None
    assert a0.is_contiguous()
    assert b0.is_contiguous()
    root = (s.double() / scaling).sqrt()
    torch.testing.assert_close(a0.double(), root[:, None] * v.double().T, rtol=4 * U32, atol=0)
    torch.testing.assert_close(b0.double(), u.double() * root, rtol=4 * U32, atol=0)
    explicit = fetch(one_weight.split(put(weight), 8, scaling=scaling, svd=svd, form="explicit").residual)
    exact = weight.double() - scaling * b0.double() @ a0.double()
    torch.testing.assert_close(explicit.double(), exact, rtol=0, atol=32 * U32 * float(weight.abs().max()))


@pytest.mark.parametrize("shape", [(64, 64), (65, 33), (1, 100), (100, 1), (40, 300)])
@pytest.mark.parametrize(("form", "blocksize"), [("nf4", 32), ("nf4", 64), ("nf4", 4096), ("int8", None)])
@pytest.mark.parametrize("double_quant", [None, False])
def test_quantised_residual_in_one_pass_is_the_quantised_residual(
    shape: tuple[int, int], form: str, blocksize: int | None, double_quant: bool | None
) -> None:
    torch.manual_seed(0)
    weight = put(torch.randn(shape))
    r = min(5, *shape)
    options = {"blocksize": blocksize, "double_quant": double_quant}
    split = one_weight.split(weight, r, form=form, **options)
    assert split.taken is None
    factors = [weight], [split.a0], [split.b0], [1.0]
    [explicit] = ops.residual_many(*factors)
    again = ops.quantize(explicit, form, **options)
    [given_factors] = ops.residual_many(*factors, form=form, **options)
    for fused in (split.residual, given_factors):
        assert fused.shape == shape
        for got, want in zip(fused, again, strict=True):
            assert torch.equal(got, want) if isinstance(want, Tensor) else got == want


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_split_takes_the_nuclear_norm_of_the_quantisation_error_down(form: str) -> None:
    """Eq. 8 of the paper: where the spectrum decays, quantising the residual costs less than quantising the weight."""
    weight = put(power_law(256, 256, 0.7).float())
    split = one_weight.split(weight, 32, form=form)
    qpissa = weight - ops.dequantize(split.residual) - split.b0 @ split.a0
    qlora = weight - ops.dequantize(ops.quantize(weight, form))
    assert torch.linalg.svdvals(qpissa).sum() < 0.9 * torch.linalg.svdvals(qlora).sum()


# ---- Many at once ----------------------------------------------------------------------------------------------------
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_no_weights_make_no_splits() -> None:
    assert ops.split_many([], [], []) == []
    with pytest.raises(ValueError, match=r"^svd: got 'qr'"):
        ops.split_many([], [], [], svd="qr")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"weights": [torch.ones(8, 6), torch.ones(8), torch.ones(8, 6)]},
            ValueError,
            r"weights\[1\]: got shape \[8\]",
        ),
        ({"weights": [torch.ones(8, 6), 1, torch.ones(8, 6)]}, TypeError, r"weights\[1\]: got int"),
        ({"ranks": [2, 2]}, ValueError, "ranks: got 2; needed: one for each of the 3 weights"),
        ({"ranks": [2, 2, 7]}, ValueError, r"r of weights\[2\]: got 7; allowed: 1 to min\(out, in\) = 6"),
        ({"ranks": [2, 2.0, 2]}, TypeError, r"r of weights\[1\]: got float"),
        ({"scalings": [1.0]}, ValueError, "scalings: got 1"),
        ({"scalings": [1.0, 0.0, 1.0]}, ValueError, r"scaling of weights\[1\]: got 0.0"),
        ({"names": ["one"]}, ValueError, "names: got 1"),
        ({"passes": 3}, ValueError, "passes: got 3"),
        ({"seed": -1}, ValueError, "seed: got -1"),
    ],
)
def test_bad_arguments_of_many_are_refused_by_name(
    change: dict[str, object], error: type[Exception], words: str
) -> None:
    arguments = put({"weights": [torch.ones(8, 6)] * 3, "ranks": [2] * 3, "scalings": [1.0] * 3} | change)
    with pytest.raises(error, match=rf"^{words}"):
        ops.split_many(**arguments)


@pytest.mark.parametrize("count", [1, 2])
def test_a_weight_among_many_that_is_not_finite_is_named(count: int) -> None:
    weights = [torch.randn(60, 50) for _ in range(9)]
    weights[4][7, 7] = float("nan")
    weights[6][0, 0] = float("inf")
    weights = put(weights)
    ranks, scalings = [3] * 9, [1.0] * 9
    with pytest.raises(ValueError, match=r"^weights\[4\]: contains NaN or Inf"):
        ops.split_many(weights, ranks, scalings)
    with pytest.raises(ValueError, match=r"^layer e: contains NaN or Inf"):
        ops.split_many(weights, ranks, scalings, names=[f"layer {name}" for name in "abcdefghi"])
    largest = torch.ops.pissa.max_abs(weights).tolist()
    with threads(count), pytest.raises((RuntimeError, ValueError), match=r"weights\[4\]: weight: contains NaN or Inf"):
        torch.ops.pissa.split_many(weights, largest, ranks, scalings, "krylov", 4, 0)


# ---- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [ops.svd_lowrank, one_weight.split])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"weight": torch.ones(8, 6, dtype=torch.int32)}, TypeError),
        ({"weight": torch.ones(8, 6, dtype=torch.float64)}, TypeError),
        ({"weight": [[1.0]]}, TypeError),
        ({"weight": torch.ones(8)}, ValueError),
        ({"weight": torch.ones(0, 6)}, ValueError),
        ({"weight": torch.ones(8, 6, device="meta")}, ValueError),
        ({"weight": torch.ones(8, 6).index_fill(0, torch.tensor(3), float("nan"))}, ValueError),
        ({"weight": torch.ones(8, 6).bfloat16().index_fill(1, torch.tensor(3), float("-inf"))}, ValueError),
        ({"r": 0}, ValueError),
        ({"r": -1}, ValueError),
        ({"r": 7}, ValueError),
        ({"r": 2.0}, TypeError),
        ({"r": True}, TypeError),
        ({"passes": 7}, ValueError),
        ({"passes": "7"}, ValueError),
        ({"passes": None}, ValueError),
        ({"passes": 0}, ValueError),
        ({"seed": -1}, ValueError),
        ({"seed": 2**63}, ValueError),
        ({"svd": "qr"}, ValueError),
    ],
)
def test_bad_arguments_are_refused_by_name(function: object, change: dict[str, object], error: type[Exception]) -> None:
    arguments = put({"weight": torch.ones(8, 6), "r": 2} | change)
    weight = arguments["weight"]
    before = weight.clone() if isinstance(weight, Tensor) else weight
    with pytest.raises(error, match=rf"^{next(iter(change))}\b"):
        function(**arguments)
    if isinstance(weight, Tensor) and weight.device.type != "meta":
        assert torch.equal(weight.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize(
    "change",
    [
        {"scaling": 0},
        {"scaling": float("inf")},
        {"blocksize": 48},
        {"double_quant": True, "form": "int8"},
    ],
)
def test_bad_split_options_are_refused_by_name(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(change))}\b"):
        one_weight.split(put(torch.ones(8, 6)), 2, **change)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_element_is_found_in_any_layout_and_nothing_beside_the_weight(dtype: torch.dtype) -> None:
    whole = torch.rand(40, 50).to(dtype)
    whole[:, 20:] = float("nan")
    whole[30:] = float("inf")
    inside = whole[:30, :20]
    inside[29, 19] = -3.0
    views = [inside, inside.mT, inside[3:, 1:], inside[::2, 1::3], inside[:1].expand(5, 20), inside.contiguous()]
    found = torch.ops.pissa.max_abs(put(views)).tolist()
    assert found == [view.abs().max().item() for view in views]
    assert math.isnan(torch.ops.pissa.max_abs(put([inside, whole[:30]])).tolist()[1])
