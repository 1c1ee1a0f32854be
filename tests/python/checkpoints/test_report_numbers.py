"""The numbers of a report beside float64 decompositions: spectra, energies."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator

import pytest
import torch

from pissa.checkpoints.spectra import energy, kinds_of, layer_report


def power_law(rows: int, columns: int, exponent: float, seed: int = 0) -> torch.Tensor:
    """A matrix whose singular values are i ** -exponent."""
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(drawn, full_matrices=False)
    return ((u * torch.arange(1, len(s) + 1) ** -exponent) @ vh).float()


def test_leading_values_are_never_above_the_true_ones() -> None:
    for exponent in (0.0, 0.3, 1.0):
        weight = power_law(96, 160, exponent)
        found, true = layer_report("layer", weight, 16), torch.linalg.svdvals(weight.double())
        assert found.values.shape == (16,)
        assert (found.values <= true[:16] * (1 + 1e-6)).all()
        assert energy([found], 16) >= 0.99 * float(true[:16].square().sum() / true.square().sum())
        assert found.total == pytest.approx(float(true.square().sum()), rel=1e-6)


def test_a_weight_of_zeros_loses_nothing() -> None:
    found = layer_report("layer", torch.zeros(8, 8), 2)
    assert energy([found], 2) == 1.0


def layers(count: int) -> Iterator[tuple[str, torch.Tensor]]:
    for i in range(count):
        yield f"model.layers.{i}.attn.q_proj", power_law(24, 32, 0.3, seed=i)
        yield f"model.layers.{i}.mlp.up_proj", power_law(40, 32, 0.9, seed=i)


def test_summaries_weigh_layers_by_their_squares() -> None:
    matrices = dict(layers(3))
    found = [layer_report(name, matrix, 30) for name, matrix in matrices.items()]
    for part in (slice(0, None, 2), slice(1, None, 2), slice(None)):
        some, mine = found[part], [matrix.double() for matrix in matrices.values()][part]
        for rank in (2, 30):
            kept = sum(float(torch.linalg.svdvals(w)[:rank].square().sum()) for w in mine)
            assert energy(some, rank) == pytest.approx(kept / sum(float(w.square().sum()) for w in mine), abs=1e-3)


def test_kinds() -> None:
    names = [f"h.{i}.{kind}" for i in range(5) for kind in ("attn.c_proj", "mlp.c_proj", "mlp.c_fc")]
    kinds = kinds_of([*names, "lm_head", "x.1.experts.0.w1"])
    assert list(kinds) == ["attn.c_proj", "mlp.c_proj", "c_fc", "lm_head", "w1"]
    assert kinds["mlp.c_proj"] == [name for name in names if name.endswith("mlp.c_proj")]


def test_nothing_of_a_matrix_is_kept() -> None:
    weight = power_law(24, 32, 0.3)
    alive = weakref.ref(weight)
    found = layer_report("layer", weight, 2)
    del weight
    assert alive() is None
    assert found.total


def test_nan_is_named() -> None:
    bad = power_law(8, 8, 0.5)
    bad[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"layer 'b': weight: .*(NaN|finite)"):
        layer_report("b", bad, 2)
