"""The decomposition of a low-rank product, against that of the dense matrix in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pissa.ops.low_rank import Spectrum

ROUNDOFF = 2.0**-53


@st.composite
def factors(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors a [k, in] and b [out, k] of any sizes and scales, and of any rank up to k: rows may repeat or be zero."""
    out, into, k = (draw(st.integers(1, limit)) for limit in (20, 20, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    a, b = torch.randn(k, into, generator=generator), torch.randn(out, k, generator=generator)
    scales = torch.tensor([10.0 ** draw(st.integers(-6, 6)) for _ in range(k)])
    copies = torch.tensor([draw(st.integers(0, k - 1)) for _ in range(k)])
    if draw(st.booleans()):
        a = a[copies]
    if draw(st.booleans()):
        b = b * draw(st.sampled_from([0.0, 1e-12, 1.0]))
    return (scales[:, None] * a).double(), b.double()


@settings(max_examples=150, deadline=None)
@given(factors(), st.integers(1, 14))
def test_what_is_kept_is_the_best_and_as_much_as_stated(pair: tuple[torch.Tensor, torch.Tensor], rank: int) -> None:
    a, b = pair
    dense = b @ a
    spectrum = Spectrum.of(a, b)
    # Householder QR of both, the decomposition of the core, the products: each is backward stable in the norm.
    noise = 10 * len(a) * (len(b) + a.shape[1]) * ROUNDOFF * float(a.norm() * b.norm())
    values = torch.linalg.svdvals(dense)
    count = min(len(values), len(spectrum.values))
    assert (spectrum.values[:count] - values[:count]).abs().max() <= noise
    assert values[count:].sum() <= noise * len(values)

    kept_a, kept_b = spectrum.factors(slice(0, rank))
    best = values[rank:].square().sum().sqrt()
    assert abs((dense - kept_b @ kept_a).norm() - best) <= 4 * noise
    energy = spectrum.energy
    lost = energy[min(rank, len(spectrum.values))]
    assert abs(energy[0].sqrt() - dense.norm()) <= noise
    assert abs(lost.sqrt() - best) <= 4 * noise
    if dense.norm() > 1e6 * noise:  # kept = 1 - ‖D - D_r‖² / ‖D‖²
        stated = 1 - lost / energy[0]
        assert stated == pytest.approx(
            1 - float((dense - kept_b @ kept_a).square().sum() / dense.square().sum()), abs=1e-5
        )
    assert torch.allclose(kept_a.norm(), kept_b.norm(), rtol=1e-9, atol=noise**0.5)
