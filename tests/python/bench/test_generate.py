"""bench.checkpoints.generate: a checkpoint that transformers loads, with the spectra that it promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[3]
SHARDS = 100_000
"""Bytes: several files, one of them for an embedding alone."""


@pytest.fixture(autouse=True)
def _bench_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def test_transformers_loads_weights_that_have_the_spectrum_and_no_two_are_equal(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bench.checkpoints.generate import generate, singular_values

    generate(tmp_path / "out", "tiny", "bf16", shard_bytes=SHARDS)
    assert len([*(tmp_path / "out").glob("*.safetensors")]) > 1
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = tokenizer("Grüße", return_tensors="pt").input_ids
    assert tokenizer.decode(tokens[0]) == "Grüße"
    assert torch.isfinite(model(tokens).logits).all()

    weights = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("_proj.weight")}
    assert len(weights) == 14
    for name, weight in weights.items():
        values = torch.linalg.svdvals(weight.float())
        expected = singular_values(len(values)) * (weight.shape[0] / singular_values(len(values)).square().sum()).sqrt()
        # Rounding to bf16 moves singular values by at most the norm of the errors, 2^-9 of each element; their norm
        # is sqrt(rows), for the mean square of elements is 1 / cols.
        assert (values - expected).abs().max() <= 2**-9 * weight.shape[0] ** 0.5, name
        # Elements look like noise: no share of the energy in few of them, as a diagonal has.
        assert weight.float().abs().max() < 6 / weight.shape[1] ** 0.5, name
    same_shape = [weight for weight in weights.values() if weight.shape == (64, 64)]
    assert len(same_shape) == 4
    assert not any(torch.equal(a, b) for i, a in enumerate(same_shape) for b in same_shape[:i])
