"""The numbers of a report beside float64 decompositions: spectra, energies."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator

import pytest
import torch

from pissa.checkpoints.spectra import energies, kinds_of, shares


def power_law(rows: int, columns: int, exponent: float, seed: int = 0) -> torch.Tensor:
    """A matrix whose singular values are i ** -exponent."""
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(drawn, full_matrices=False)
    return ((u * torch.arange(1, len(s) + 1) ** -exponent) @ vh).float()


def test_leading_directions_never_hold_more_than_the_true_ones() -> None:
    for exponent in (0.0, 0.3, 1.0):
        weight = power_law(96, 160, exponent)
        true = torch.linalg.svdvals(weight.double()).square()
        total, *held = energies("layer", weight, [4, 16]).tolist()
        for rank, one in zip((4, 16), held, strict=True):
            assert 0.99 * true[:rank].sum() <= one <= true[:rank].sum() * (1 + 1e-6)
        assert total == pytest.approx(float(true.sum()), rel=1e-6)


def test_a_weight_of_zeros_loses_nothing() -> None:
    assert shares([energies("layer", torch.zeros(8, 8), [2])]) == [1.0]


def layers(count: int) -> Iterator[tuple[str, torch.Tensor]]:
    for i in range(count):
        yield f"model.layers.{i}.attn.q_proj", power_law(24, 32, 0.3, seed=i)
        yield f"model.layers.{i}.mlp.up_proj", power_law(40, 32, 0.9, seed=i)


def test_summaries_weigh_layers_by_their_squares() -> None:
    matrices = dict(layers(3))
    found = [energies(name, matrix, [2, 30]) for name, matrix in matrices.items()]
    for part in (slice(0, None, 2), slice(1, None, 2), slice(None)):
        some, mine = found[part], [matrix.double() for matrix in matrices.values()][part]
        for rank, share in zip((2, 30), shares(some), strict=True):
            kept = sum(float(torch.linalg.svdvals(w)[:rank].square().sum()) for w in mine)
            assert share == pytest.approx(kept / sum(float(w.square().sum()) for w in mine), abs=1e-3)


def test_kinds() -> None:
    names = [f"h.{i}.{kind}" for i in range(5) for kind in ("attn.c_proj", "mlp.c_proj", "mlp.c_fc")]
    kinds = kinds_of([*names, "lm_head", "x.1.experts.0.w1"])
    assert list(kinds) == ["attn.c_proj", "mlp.c_proj", "mlp.c_fc", "lm_head", "w1"]
    assert kinds["mlp.c_proj"] == [name for name in names if name.endswith("mlp.c_proj")]


def test_nothing_of_a_matrix_is_kept() -> None:
    weight = power_law(24, 32, 0.3)
    alive = weakref.ref(weight)
    found = energies("layer", weight, [2])
    del weight
    assert alive() is None
    assert found.all()


def test_nan_is_named() -> None:
    bad = power_law(8, 8, 0.5)
    bad[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"layer 'b': weight: .*(NaN|finite)"):
        energies("b", bad, [2])
