"""The numbers of a report beside float64 decompositions: spectra, energies, errors."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator

import pytest
import torch

from pissa import ops
from pissa.checkpoints.spectra import METHODS, PLAIN, Summary, by_kind, layer_report, quant_errors, singular_values


def power_law(rows: int, columns: int, exponent: float, seed: int = 0) -> torch.Tensor:
    """A matrix whose singular values are i ** -exponent."""
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(drawn, full_matrices=False)
    return ((u * torch.arange(1, len(s) + 1) ** -exponent) @ vh).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 24), (24, 5000), (1, 7)])
def test_exact_spectrum(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = power_law(*shape, 0.5).to(dtype)
    found = layer_report("layer", weight, 1, exact=True)
    expected = torch.linalg.svdvals(weight.double())
    # The Gram matrix has errors of eps |W|^2 for each of its sums; a root near 0 makes sqrt(eps) of them.
    torch.testing.assert_close(found.values, expected, rtol=0, atol=float(1e-7 * expected[0]))
    assert found.total == pytest.approx(float(expected.square().sum()), rel=1e-12)
    for rank in (1, len(expected) // 2, len(expected)):
        held = float(expected[:rank].square().sum() / expected.square().sum())
        assert Summary([found]).energy(rank) == pytest.approx(held, abs=1e-6)
        assert found.lost(rank) == pytest.approx((1 - held) * found.total, abs=2e-6 * found.total)
    assert found.stable_rank == pytest.approx(float(expected.square().sum() / expected[0] ** 2), rel=1e-6)


def test_leading_values_are_never_above_the_true_ones() -> None:
    for exponent in (0.0, 0.3, 1.0):
        weight = power_law(96, 160, exponent)
        found, true = layer_report("layer", weight, 16), torch.linalg.svdvals(weight.double())
        assert found.values.shape == (16,)
        assert (found.values <= true[:16] * (1 + 1e-6)).all()
        assert Summary([found]).energy(16) >= 0.99 * float(true[:16].square().sum() / true.square().sum())
        assert found.total == pytest.approx(float(true.square().sum()), rel=1e-6)


def test_a_weight_of_zeros_loses_nothing() -> None:
    found = layer_report("layer", torch.zeros(8, 8), 2)
    assert (Summary([found]).energy(2), found.lost(2), found.stable_rank) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_errors_of_quantised_bases(format: str) -> None:
    weight = power_law(48, 80, 0.5).bfloat16()
    found = quant_errors(weight, format, [4, 100])
    assert list(found) == [(PLAIN, 0), *((method, rank) for rank in (4, 100) for method in METHODS)]

    expected = {(PLAIN, 0): weight.double() - ops.dequantize(ops.quantize(weight, format)).double()}
    for method, options in METHODS.items():
        split = ops.split(weight, 4, form=format, **options)
        assert isinstance(split.residual, ops.QuantizedWeight)
        product = split.b0.double() @ split.a0.double()
        expected[method, 4] = weight.double() - ops.dequantize(split.residual).double() - product
    for key, error in expected.items():
        assert found[key] == pytest.approx(float(error.square().sum()), rel=1e-4)
    assert found["QPiSSA T=5", 4] < found["QPiSSA T=1", 4] < found[PLAIN, 0]


def layers(count: int) -> Iterator[tuple[str, torch.Tensor]]:
    for i in range(count):
        yield f"model.layers.{i}.attn.q_proj", power_law(24, 32, 0.3, seed=i)
        yield f"model.layers.{i}.mlp.up_proj", power_law(40, 32, 0.9, seed=i)


def test_summaries_weigh_layers_by_their_squares() -> None:
    matrices = dict(layers(3))
    found = [layer_report(name, matrix, 30, [2, 30], "nf4") for name, matrix in matrices.items()]
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
        assert some.removed((PLAIN, 0)) == 0
        assert some.removed(("QPiSSA T=1", 2)) == 1 - some.error(("QPiSSA T=1", 2)) / some.error((PLAIN, 0)) > 0.05


def test_summaries_of_errors_are_those_of_the_quantised_layers() -> None:
    found = [layer_report(name, weight, 2, [2], None if i else "nf4") for i, (name, weight) in enumerate(layers(2))]
    assert Summary(found).quantised == found[:1]
    assert Summary(found).error() == Summary(found[:1]).error() > 0


def test_nothing_of_a_matrix_is_kept() -> None:
    weight = power_law(24, 32, 0.3)
    alive = weakref.ref(weight)
    found = layer_report("layer", weight, 2, [2], "nf4")
    del weight
    assert alive() is None
    assert found.errors


def test_nan_is_named() -> None:
    bad = power_law(8, 8, 0.5)
    bad[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"layer 'b': weight: .*(NaN|finite)"):
        layer_report("b", bad, 2)


def test_singular_values_of_a_transposed_view() -> None:
    weight = power_law(30, 12, 0.5)
    assert torch.equal(singular_values(weight), singular_values(weight.mT))
