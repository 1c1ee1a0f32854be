"""A model that fully_shard has sharded is wrapped then: it is what it would be if it had been wrapped first. The
processes run `sharded_checks` by `distributed_worker.py`, in one launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapter_files import content
from processes import checked

pytestmark = [pytest.mark.cpu_only, pytest.mark.nightly]

Found = dict[str, list[Any]]
"""What the checks have returned in each process, by name."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    return checked(2, "sharded", folder)


@pytest.fixture(scope="module")
def losses(found: Found) -> list[float]:
    """Of the model that was wrapped first."""
    return found["trained"][0]["implicit"][0]


def test_training_is_that_of_a_model_wrapped_first(found: Found) -> None:
    for ways in found["trained"]:
        for way, (first, losses, same_bits) in ways.items():
            assert first == losses, way
            assert same_bits, way
            assert losses[-1] < losses[0]


def test_one_process_saves_the_same_files_without_gathering_the_base(found: Found, folder: Path) -> None:
    first, other = (folder / way for way in ("wrapped_first", "sharded_first"))
    assert content(first) == content(other)


def test_a_folder_is_loaded_onto_sharded_weights(found: Found) -> None:
    for losses in found["loaded"]:
        assert losses == dict.fromkeys(["whole", "sharded", "later", "again"], losses["whole"])


def test_adapters_are_added_and_transformers_trains_what_it_has_sharded_while_loading(found: Found) -> None:
    for whole, sharded in (*found["more_adapters"], *found["loaded_by_transformers"]):
        assert whole == sharded


def test_gradients_are_accumulated_and_clipped_as_in_one_process(found: Found) -> None:
    for whole, sharded in (pair for ends in found["accumulated"] for pair in ends.values()):
        # Four gradients are added in another order, each a sum over 30 tokens.
        assert sharded == pytest.approx(whole, rel=4 * 30 * 2**-24)
    assert len({ends["norms"][1] for ends in found["accumulated"]}) == 1


def test_any_mesh_of_all_processes_and_weights_left_whole_will_do(found: Found, losses: list[float]) -> None:
    for meshes in found["meshes"]:
        assert meshes == dict.fromkeys(["named", "replicated", "replicas", "offloaded"], losses)
    assert found["after_a_forward_pass"] == [losses, losses]


def test_an_adapter_is_merged_and_taken_out_again(found: Found) -> None:
    for before, merged, after in found["merged"]:
        assert before == after
        assert merged == pytest.approx(before, rel=1e-5)


def test_a_process_holds_one_weight_of_its_own_and_one_that_passes(found: Found) -> None:
    assert max(found["peak"]) == 2


def test_what_one_process_finds_ends_all(found: Found, losses: list[float]) -> None:
    assert sorted(error for (error, _), _ in found["nan"]) == ["RankError", "ValueError"]
    for (_, words), afterwards in found["nan"]:
        assert "layer model.layers.0.mlp.up_proj: weight: contains NaN" in words
        assert afterwards == losses


WORDS = {
    "bitsandbytes": "0 is a Linear4bit of bitsandbytes, but its codes are sharded",
    "quant": "sharded by fully_shard, which keeps it, so that its base cannot become nf4",
    "whole weights": "sharded by fully_shard, which keeps it",
    "explicit": "cannot become explicit: wrap the model first and shard it then",
    "modules_to_save": "modules_to_save=['lm_head'] trains a part of the model itself",
    "task_type": "adds its head to modules_to_save",
    "bias": "bias='all' trains a part",
    "trainable_token_indices": "trainable_token_indices=[1] trains a part",
    "experts": "gate_up_proj is a DTensor, not a dense parameter",
    "a layer alone": "model.layers.0.self_attn.q_proj is sharded by its own fully_shard",
    "FSDP1": "the model is wrapped in FullyShardedDataParallel",
    "tensor parallel": "load the model without tp_plan",
    "load": "keeps the base of layer model.layers.0.self_attn.q_proj as nf4",
}


def test_what_cannot_be_wrapped_says_why(found: Found) -> None:
    for refused in found["refused"]:
        assert refused.keys() == WORDS.keys()
        for what, (error, words) in refused.items():
            assert error in ("TypeError", "ValueError")
            assert WORDS[what] in words
