"""The numbers of a report beside float64 decompositions: spectra, energies, nuclear norms, errors."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator

import pytest
import torch

from pissa import ops
from pissa.checkpoints import nuclear
from pissa.checkpoints.layer_report import Summary, by_kind, layer_reports
from pissa.checkpoints.nuclear import NuclearNorm, nuclear_norm
from pissa.checkpoints.quant_errors import METHODS, PLAIN, quant_errors
from pissa.checkpoints.spectrum import norm_squared, singular_values, spectrum_of


def power_law(rows: int, columns: int, exponent: float, seed: int = 0) -> torch.Tensor:
    """A matrix whose singular values are i ** -exponent."""
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(drawn, full_matrices=False)
    return ((u * torch.arange(1, len(s) + 1) ** -exponent) @ vh).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 24), (24, 5000), (1, 7)])
def test_exact_spectrum(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = power_law(*shape, 0.5).to(dtype)
    found = spectrum_of(weight, 1, exact=True)
    expected = torch.linalg.svdvals(weight.double())
    # The Gram matrix has errors of eps |W|^2 for each of its sums; a root near 0 makes sqrt(eps) of them.
    torch.testing.assert_close(found.values, expected, rtol=0, atol=float(1e-7 * expected[0]))
    assert found.total == pytest.approx(float(expected.square().sum()), rel=1e-12)
    for rank in (1, len(expected) // 2, len(expected)):
        held = float(expected[:rank].square().sum() / expected.square().sum())
        assert found.energy(rank) == pytest.approx(held, abs=1e-6)
        assert found.lost(rank) == pytest.approx((1 - held) * found.total, abs=2e-6 * found.total)
    assert found.stable_rank == pytest.approx(float(expected.square().sum() / expected[0] ** 2), rel=1e-6)


def test_leading_values_are_never_above_the_true_ones() -> None:
    for exponent in (0.0, 0.3, 1.0):
        weight = power_law(96, 160, exponent)
        found, true = spectrum_of(weight, 16), torch.linalg.svdvals(weight.double())
        assert found.values.shape == (16,)
        assert (found.values <= true[:16] * (1 + 1e-6)).all()
        assert found.energy(16) >= 0.99 * float(true[:16].square().sum() / true.square().sum())
        assert found.total == pytest.approx(float(true.square().sum()), rel=1e-6)


def test_a_weight_of_zeros_loses_nothing() -> None:
    found = spectrum_of(torch.zeros(8, 8), 2)
    assert (found.energy(2), found.lost(2), found.stable_rank) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("shape", [(320, 512), (512, 320), (400, 400)])
def test_estimated_nuclear_norm_of_an_error_of_nf4(shape: tuple[int, int]) -> None:
    assert min(shape) > nuclear.EXACT_SIDE
    weight = power_law(*shape, 0.4)
    error = weight - ops.dequantize(ops.quantize(weight, "nf4"))
    found, true = nuclear_norm(error), float(torch.linalg.svdvals(error.double()).sum())
    assert 0 < found.standard_error < 0.015 * true
    assert abs(found.value - true) < 4 * found.standard_error + 0.003 * true
    assert nuclear_norm(error, exact=True).value == pytest.approx(true, rel=1e-9)
    assert nuclear_norm(error, exact=True).standard_error == 0


def test_standard_error_is_that_of_the_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimates of many seeds spread as each of them says."""
    monkeypatch.setattr(nuclear, "EXACT_SIDE", 0)
    gaussian = torch.randn(60, 90, generator=torch.Generator().manual_seed(0))
    true = float(torch.linalg.svdvals(gaussian.double()).sum())
    deviations, claims = [], []
    for seed in range(60):
        # Other signs for a row are other probes.
        signs = torch.randint(0, 2, (60, 1), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
        rotated = signs * gaussian
        found = nuclear_norm(rotated)
        deviations.append(found.value - true)
        claims.append(found.standard_error)
    spread = math.sqrt(sum(x * x for x in deviations) / len(deviations))
    # sqrt(2 * 60) degrees of freedom: a relative spread of 0.09; 3.5 of them
    assert spread == pytest.approx(math.sqrt(sum(x * x for x in claims) / len(claims)), rel=0.32)
    assert abs(sum(deviations) / len(deviations)) < 3.5 * spread / math.sqrt(len(deviations)) + 0.001 * true


def test_small_matrices_are_exact() -> None:
    matrix = power_law(20, 30, 0.5)
    assert nuclear_norm(matrix).value == pytest.approx(float(torch.linalg.svdvals(matrix.double()).sum()), rel=1e-9)
    assert nuclear_norm(torch.zeros(20, 30)).value == 0


def test_quotients_of_nuclear_norms() -> None:
    a, b = torch.tensor([3.0, 5.0, 4.0]), torch.tensor([6.0, 10.0, 8.0])
    assert NuclearNorm(a).over(NuclearNorm(b)) == (0.5, 0.0)
    quotient, standard_error = NuclearNorm(a).over(NuclearNorm(torch.full((3,), 8.0)))
    assert quotient == 0.5
    assert standard_error == pytest.approx(1 / math.sqrt(3) / 8)
    assert NuclearNorm(b * 0).over(NuclearNorm(b * 0)) == (1.0, 0.0)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_errors_of_quantised_bases(format: str) -> None:
    weight = power_law(48, 80, 0.5).bfloat16()
    found = {(method, rank): error for method, rank, error in quant_errors(weight, format, [4, 100])}
    assert list(found) == [(PLAIN, 0), *((method, rank) for rank in (4, 100) for method in METHODS)]
    assert list(METHODS) == ["LoftQ", "QPiSSA T=1", "QPiSSA T=5"]

    expected = {(PLAIN, 0): weight.double() - ops.dequantize(ops.quantize(weight, format)).double()}
    for method, options in METHODS.items():
        split = ops.split(weight, 4, form=format, **options)
        assert isinstance(split.residual, ops.QuantizedWeight)
        product = split.b0.double() @ split.a0.double()
        expected[method, 4] = weight.double() - ops.dequantize(split.residual).double() - product
    norms = {key: float(torch.linalg.svdvals(error).sum()) for key, error in expected.items()}
    for key, error in expected.items():
        assert found[key].squared == pytest.approx(float(error.square().sum()), rel=1e-4)
        assert found[key].nuclear.value == pytest.approx(norms[key], rel=1e-4)
        removed, standard_error = found[key].removed(found[PLAIN, 0])
        assert removed == pytest.approx(1 - norms[key] / norms[PLAIN, 0], abs=1e-4)
        assert standard_error == 0
        relative = found[key].relative(norm_squared(weight))
        assert relative == pytest.approx(float(error.norm() / weight.double().norm()), rel=1e-4)
    assert found["QPiSSA T=5", 4].squared < found["QPiSSA T=1", 4].squared < found[PLAIN, 0].squared
    assert found["LoftQ", 4].squared < found[PLAIN, 0].squared


def layers(count: int) -> Iterator[tuple[str, torch.Tensor]]:
    for i in range(count):
        yield f"model.layers.{i}.attn.q_proj", power_law(24, 32, 0.3, seed=i)
        yield f"model.layers.{i}.mlp.up_proj", power_law(40, 32, 0.9, seed=i)


def test_summaries_weigh_layers_by_their_squares() -> None:
    matrices = dict(layers(3))
    found = list(layer_reports(matrices.items(), 30, [2, 30], quant="nf4"))
    assert [layer.name for layer in found] == list(matrices)
    kinds = by_kind(found)
    assert {kind: len(some.layers) for kind, some in kinds.items()} == {"q_proj": 3, "up_proj": 3}
    for some in (*kinds.values(), Summary(found)):
        mine = [matrices[layer.name].double() for layer in some.layers]
        for rank in (2, 30):
            kept = sum(float(torch.linalg.svdvals(w)[:rank].square().sum()) for w in mine)
            assert some.energy(rank) == pytest.approx(kept / sum(float(w.square().sum()) for w in mine), abs=1e-3)
        plain = [w - ops.dequantize(ops.quantize(w.float())).double() for w in mine]
        squared = sum(float(e.square().sum()) for e in plain) / sum(float(w.square().sum()) for w in mine)
        assert some.error((PLAIN, 0)) == pytest.approx(math.sqrt(squared), rel=1e-4)
        assert some.removed((PLAIN, 0)) == (0.0, 0.0)
        assert some.removed(("QPiSSA T=1", 2))[0] > 0.05


def test_only_chosen_layers_are_quantised() -> None:
    found = list(layer_reports(layers(2), 2, [2], quant="nf4", quantised=lambda name: name.endswith("0.attn.q_proj")))
    assert [layer.name for layer in found if layer.errors] == ["model.layers.0.attn.q_proj"]
    assert len(Summary(found).quantised) == 1
    assert Summary(found).error((PLAIN, 0)) == Summary(found[:1]).error((PLAIN, 0))


def test_one_matrix_at_a_time() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def matrices() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for name, matrix in layers(4):
            most = max(most, sum(ref() is not None for ref in alive))
            alive.append(weakref.ref(matrix))
            yield name, matrix
            del matrix

    found = list(layer_reports(matrices(), 2, [2], quant="nf4"))
    assert len(found) == len(alive) == 8
    assert most == 0
    assert all(ref() is None for ref in alive)


def test_nan_is_named() -> None:
    bad = power_law(8, 8, 0.5)
    bad[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"layer b: weight: .*(NaN|finite)"):
        list(layer_reports([("a", power_law(8, 8, 0.5)), ("b", bad)], 2))


def test_singular_values_of_a_transposed_view() -> None:
    weight = power_law(30, 12, 0.5)
    assert torch.equal(singular_values(weight), singular_values(weight.mT))
