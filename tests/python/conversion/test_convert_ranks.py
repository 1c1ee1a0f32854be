"""Conversion to a lower rank: the best approximation, files that every runtime scales right."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn

import pissa
from language_models import Make, error, logits
from lora_files import NAMES, PATTERNS, check_best, config_of, train_ours
from peft_adapters import plain_logits
from pissa.adapters.lora_folder import open_adapter, with_sizes


def test_a_lower_rank_is_the_best_of_that_rank(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    train_ours(tiny_llama, tokens, ours, **PATTERNS)
    for rank in (1, 3, 8, 50):
        done = pissa.convert(ours, tmp_path / str(rank), rank=rank)
        check_best(ours, tmp_path / str(rank), done, rank)
        peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / str(rank))
    assert {written for _, written in done.ranks.values()} == {6, 8, 10}  # nothing to lower


def test_an_adapter_that_learnt_nothing(tiny_llama: Make, tmp_path: Path) -> None:
    pissa.wrap(tiny_llama(), r=4).save_pretrained(tmp_path / "ours")
    done = pissa.convert(tmp_path / "ours", tmp_path / "lora", rank=1)
    assert {written for _, written in done.ranks.values()} == {1}
    assert done.kept == 1


def test_runtimes_that_know_no_patterns_scale_right(tiny_llama: Make, tmp_path: Path) -> None:
    """Where all scalings are equal alpha / r is that of every layer, whatever its rank."""
    patterns = {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"q_proj": 1.5}}
    model = pissa.wrap(tiny_llama(), r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], **patterns)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(tmp_path / "one")
    done = pissa.convert(tmp_path / "one", tmp_path / "lora", rank=4)
    assert sorted(written for _, written in done.ranks.values()) == [2, 2, 4, 4]
    config = config_of(tmp_path / "lora")
    assert config["lora_alpha"] / config["r"] == 1.5
    lora = open_adapter(tmp_path / "lora")
    assert {factors.scaling for factors in lora.factors.values()} == {1.5}
    for name, factors in lora.factors.items():
        key = get_pattern_key(list(config["rank_pattern"]), name)
        rank, _ = lora.weights.entries[factors.keys[0]].shape
        assert config["rank_pattern"].get(key, config["r"]) == factors.rank == rank


NAME = st.lists(st.sampled_from(["a", "b", "a+b", "layers", "0", "1"]), min_size=1, max_size=4).map(".".join)
SCALING = st.fractions(min_value="1/64", max_value=64, max_denominator=64).map(float)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(NAME, st.tuples(st.integers(1, 200), SCALING), min_size=1, max_size=8), st.booleans())
def test_pefts_rules_give_each_layer_its_rank_and_scaling(sizes: dict[str, tuple[int, float]], rslora: bool) -> None:
    """Also where a name is the end of another, or means something as a pattern."""
    config = with_sizes({"use_rslora": rslora}, sizes)
    for name, (rank, scaling) in sizes.items():
        rank_key, alpha_key = (
            get_pattern_key(list(config[field]), name) for field in ("rank_pattern", "alpha_pattern")
        )
        found = config["rank_pattern"].get(rank_key, config["r"])
        alpha = config["alpha_pattern"].get(alpha_key, config["lora_alpha"])
        assert found == rank
        # One rounding of alpha, four units if a whole number is near, and those of the root and the quotient here
        assert alpha / (rank**0.5 if rslora else rank) == pytest.approx(scaling, rel=8 * 2**-52)


def test_an_alpha_that_is_a_whole_number_is_written_as_one() -> None:
    scaling = 16 / 15**0.5
    assert scaling * 15**0.5 != 16
    assert with_sizes({"use_rslora": True}, {"a": (15, scaling)})["lora_alpha"] == 16


def test_dora_keeps_its_magnitudes(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    model = train_ours(tiny_llama, tokens, tmp_path / "ours", use_dora=True)
    pissa.convert(tmp_path / "ours", tmp_path / "lora", rank=6)
    ours, lora = (load_file(tmp_path / name / NAMES[1]) for name in ("ours", "lora"))
    kept = [name for name in ours if name.endswith("lora_magnitude_vector")]
    assert len(kept) == 14
    assert all(torch.equal(ours[name], lora[name]) for name in kept)
    found, expected = plain_logits(tiny_llama(), tmp_path / "lora", tokens), logits(model, tokens)
    moved = error(logits(tiny_llama(), tokens), expected)
    assert error(found, expected) < moved / 3
