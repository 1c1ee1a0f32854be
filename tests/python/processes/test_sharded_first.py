"""A model that fully_shard has sharded is wrapped then: it is what it would be if it had been wrapped first. The
processes run `sharded_checks` by `distributed_worker.py`, in one launch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from processes import launch

pytestmark = [pytest.mark.cpu_only, pytest.mark.nightly]

FILES = ["adapter_model.safetensors", "pissa.safetensors", "pissa.json", "adapter_config.json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each process has found, by the checks' names."""
    done = launch(2, "distributed_worker.py", "sharded", folder)
    assert done.returncode == 0, done.stdout[-5000:]
    found = []
    for rank in range(2):
        written = json.loads((folder / f"sharded-2-{rank}.json").read_text())
        for name, result in written.items():
            assert "error" not in result, f"rank {rank}, {name}: {result['error']}"
        found.append({name: result["value"] for name, result in written.items()})
    return found


@pytest.fixture(scope="module")
def losses(ranks: list[dict[str, Any]]) -> list[float]:
    """Of the model that was wrapped first."""
    return ranks[0]["trained"]["implicit"][0]


def test_training_is_that_of_a_model_wrapped_first(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for way, (first, losses, same_bits) in found["trained"].items():
            assert first == losses, way
            assert same_bits, way
            assert losses[-1] < losses[0]


def test_one_process_saves_the_same_files_without_gathering_the_base(ranks: list[dict[str, Any]], folder: Path) -> None:
    for name in FILES:
        first, other = (folder / way / name for way in ("wrapped_first", "sharded_first"))
        assert first.read_bytes() == other.read_bytes(), name


def test_a_folder_is_loaded_onto_sharded_weights(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        whole = found["loaded"].pop("whole")
        assert found["loaded"] == {"sharded": whole, "later": whole, "again": whole}


def test_adapters_are_added(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["more_adapters"][0] == found["more_adapters"][1]


def test_gradients_are_accumulated_and_clipped_as_in_one_process(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for whole, sharded in found["accumulated"].values():
            # Four gradients are added in another order, each a sum over 30 tokens.
            assert sharded == pytest.approx(whole, rel=4 * 30 * 2**-24)
    assert ranks[0]["accumulated"]["norms"][1] == ranks[1]["accumulated"]["norms"][1]


def test_any_mesh_of_all_processes_will_do(ranks: list[dict[str, Any]], losses: list[float]) -> None:
    for found in ranks:
        assert found["meshes"] == dict.fromkeys(["named", "replicated", "replicas", "offloaded"], losses)


def test_weights_that_fsdp_has_left_whole_are_sharded_ones(ranks: list[dict[str, Any]], losses: list[float]) -> None:
    for found in ranks:
        assert found["after_a_forward_pass"] == losses


def test_an_adapter_is_merged_and_taken_out_again(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        before, merged, after = found["merged"]
        assert before == after
        assert merged == pytest.approx(before, rel=1e-5)


def test_a_process_holds_one_weight_of_its_own_and_one_that_passes(ranks: list[dict[str, Any]]) -> None:
    assert max(found["peak"] for found in ranks) == 2


def test_what_one_process_finds_ends_all(ranks: list[dict[str, Any]], losses: list[float]) -> None:
    assert sorted(found["nan"][0][0] for found in ranks) == ["RankError", "ValueError"]
    for found in ranks:
        error, afterwards = found["nan"]
        assert "layer model.layers.1.mlp.up_proj: weight: contains NaN" in error[1]
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
    "a layer alone": "model.layers.0.self_attn.q_proj is sharded by a fully_shard of its own",
    "FSDP1": "the model is wrapped in FullyShardedDataParallel",
    "tensor parallel": "load the model without tp_plan",
    "load": "keeps the base of layer model.layers.0.self_attn.q_proj as nf4",
}


@pytest.mark.parametrize("what", WORDS)
def test_what_cannot_be_wrapped_says_why(what: str, ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        error, words = found["refused"][what]
        assert error in ("TypeError", "ValueError")
        assert WORDS[what] in words


def test_transformers_trains_what_it_has_sharded_while_loading(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        replicated, sharded = found["loaded_by_transformers"]
        assert replicated == sharded
