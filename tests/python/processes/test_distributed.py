"""Several processes: the start is divided among them, training is that of one, files fit any number of them, and what
ends one ends all. The processes run `distributed_worker.py`; one launch for each number of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import nn

import pissa
from adapter_files import content
from daily import each
from distributed_checks import SHARDS_BYTES, started
from distributed_worker import DAILY, FORMS, SAME, bits, llama, mixtral, sgd, tokens, train
from pissa import PissaModel, distributed
from processes import checked
from torch_settings import threads

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning"),
]


class Found(dict[str, list[Any]]):
    """What the checks have returned in each process, by name."""

    def __missing__(self, name: str) -> NoReturn:
        if SHARDS_BYTES:
            raise KeyError(name)
        pytest.skip("FSDP2 shards codes in uint8 from torch 2.12 on")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module", params=each([2, 3], [2]))
def some(request: pytest.FixtureRequest, folder: Path) -> Found:
    """Two processes check the daily forms, three all of them."""
    return Found(checked(request.param, "checks", folder))


@cache
def one_process(form: str, build: Any = llama, columns: int = 11) -> list[float]:
    return train(pissa.wrap(build(), r=4, **FORMS[form]), tokens(columns))


# ---- The start -------------------------------------------------------------------------------------------------------


def test_processes_start_together_with_the_bits_of_one(some: Found) -> None:
    with threads(1):  # as in each process
        expected = started()
    for found in some["started"]:
        assert found == expected


def test_each_process_decomposes_a_share(some: Found) -> None:
    shares = some["shares"]
    names = [name for share in shares for name in share]
    linear = [name for name, module in llama().named_modules() if isinstance(module, nn.Linear)]
    assert sorted(names) == sorted(set(linear) - {"lm_head"})
    loads = [sum(share.values()) for share in shares]
    assert max(loads) - min(loads) <= max(size for share in shares for size in share.values())


def test_work_is_divided_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    sizes = {"small": 1, "large": 9, "middle": 3, "other": 2}
    assert distributed.owners(sizes) == {"large": 0, "middle": 1, "other": 1, "small": 1}


def test_an_error_in_one_process_is_one_in_all(some: Found) -> None:
    *others, last = some["failing"]
    assert {name: error for name, (error, _) in last.items()} == {
        "while PEFT injects": "ValueError",
        "in the arguments": "ValueError",
        "at the end": "MemoryError",
        "while bases are replaced": "MemoryError",
        "a second adapter": "ValueError",
    }
    for found in others:
        for name, (error, words) in found.items():
            assert error == "RankError"
            assert f"rank {len(others)} failed" in words
            assert last[name][1] in words


def test_what_one_process_finds_in_its_share_ends_all(some: Found) -> None:
    found = some["nan"]
    assert sorted(error for error, _ in found) == sorted(["ValueError", *["RankError"] * (len(found) - 1)])
    for _, words in found:
        assert "layer model.layers.0.mlp.up_proj: weight: contains NaN" in words


def test_processes_with_different_models_say_so(some: Found) -> None:
    for found in some["other_models"]:
        assert {error for error, _ in found.values()} == {"ValueError"}
        assert "layer model.layers.0.self_attn.q_proj has other weights on rank 1" in found["weights"][1]
        assert "seed is 0 on rank 0 and 1 on rank 1" in found["configuration"][1]
        assert "layer 0 has other weights on rank 1 than on rank 0, or other adapters" in found["layers"][1]
        assert "layer model.layers.0.self_attn.q_proj has other weights" in found["adapters"][1]


def test_adapters_that_are_sharded_are_not_added_to_nor_saved_in_parts(some: Found) -> None:
    for found in some["sharded_weights"]:
        assert "add it before fully_shard" in found["add_adapter"][1]
        assert "Gather it on all ranks" in found["save_pretrained"][1]


def test_a_model_that_deepspeed_has_partitioned_is_saved_from_what_was_gathered(tmp_path: Path) -> None:
    model = pissa.wrap(llama(), r=4)
    model.save_pretrained(tmp_path / "before")  # from here on the fingerprints are known
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape, parameter.data = number, parameter.shape, torch.empty(0)
    with pytest.raises(ValueError, match=r"this process holds only a part of .*\. Gather it on all ranks"):
        model.save_pretrained(tmp_path / "partitioned")
    assert not (tmp_path / "partitioned").exists()
    with pytest.raises(ValueError, match=r"load the adapter before deepspeed\.initialize"):
        model.load_adapter(tmp_path / "before", "default")
    model.save_pretrained(tmp_path / "gathered", state_dict=state)
    assert content(tmp_path / "gathered") == content(tmp_path / "before")


# ---- Training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_losses_are_those_of_one_process(parallel: str, some: Found) -> None:
    expected = {form: one_process(form) for form in FORMS if form in some[parallel][0]}
    assert expected.keys() >= {*DAILY}
    expected["nf4, recomputed"] = expected["nf4"]
    assert all(losses[2] < losses[1] < losses[0] for losses in expected.values())
    if parallel == "ddp":
        expected["nf4, no buffers"] = expected["nf4"]
    for found in some[parallel]:
        assert found.keys() == expected.keys()
        for form, losses in expected.items():
            assert found[form] == pytest.approx(losses, **SAME), form


@pytest.mark.parametrize("name", ["fsdp1", "accelerate_fsdp2"])
def test_other_loops_train_the_same(name: str, some: Found) -> None:
    for found in some[name]:
        for form, losses in found.items():
            assert losses == pytest.approx(one_process(form), **SAME), form


def test_fsdp_computes_in_bfloat16_and_casts_no_codes(some: Found) -> None:
    for found in some["mixed_precision"]:
        assert found["embeddings"][2] < found["embeddings"][0]
        assert found["bfloat16"] == found["uint8"]
        assert found["bfloat16"][2] < found["bfloat16"][0]
        error, words = found["float32"]
        assert error == "TypeError"
        assert "were cast to torch.bfloat16" in words


def test_parts_of_a_layer_cannot_be_sharded_alone(some: Found) -> None:
    for found in some["parts_sharded_alone"]:
        for error, words in found.values():
            assert error == "TypeError"
            assert "call fully_shard on the blocks of the model" in words


def test_experts_that_are_at_rest_in_some_processes_train_as_in_one(some: Found) -> None:
    found = some["experts"]
    assert len({tuple(entry.pop("busy")) for entry in found}) > 1  # or it would show nothing
    expected = one_process("nf4", mixtral, columns=3)
    for entry in found:
        for parallel, losses in entry.items():
            assert losses == pytest.approx(expected, **SAME), parallel


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_a_sharded_model_is_saved_by_one_process_had_in_memory_by_each_and_loaded(some: Found, folder: Path) -> None:
    for found in some["files"]:
        states = {form: found[form] for form in FORMS if form in found}
        assert states.keys() >= {*DAILY}
        for form, state in states.items():
            saved = folder / f"saved-{len(some['files'])}" / form
            assert bits(PissaModel.from_pretrained(llama(), saved).state_dict()) == state["gathered"]
            for other in ("trained_only", "gathered"):
                assert content(saved / other) == content(saved), form
            assert state["lora"], form
            assert state["loaded"], form


def test_a_sharded_model_is_not_saved_without_its_fingerprints(some: Found, folder: Path) -> None:
    error, words = some["files"][0]["of unknown weights"]
    assert error == "ValueError"
    assert "give save_pretrained a state_dict that has the frozen weights too" in words
    assert not (folder / f"saved-{len(some['files'])}/implicit/refused/adapter_model.safetensors").exists()


def test_what_peft_hands_out_of_a_gathered_state_is_the_plain_lora(some: Found) -> None:
    found = some["files"][0]
    assert found["handed out whole"] is True
    error, words = found["handed out in parts"]
    assert error == "ValueError"
    assert "lora_A.default.weight. Gather it on all ranks" in words


@pytest.mark.parametrize("form", ["implicit", "nf4", "nf4 in bfloat16"])
def test_what_accelerate_has_gathered_is_saved(form: str, some: Found, folder: Path) -> None:
    saved = folder / f"accelerate-{len(some['accelerate_fsdp2'])}" / form
    model = PissaModel.from_pretrained(llama(), saved, is_trainable=True)
    expected = pissa.wrap(llama(), r=4, **FORMS[form])
    train(expected, tokens())
    assert train(model, tokens(), steps=1) == pytest.approx(train(expected, tokens(), steps=1), **SAME)


def test_an_engine_gets_the_trained_function_of_a_sharded_model(some: Found) -> None:
    for found in some["merged_while_sharded"]:
        assert found.keys() == {"nf4", "experts"}
        assert all(difference < 1e-5 for difference in found.values()), found  # of sums of hundreds of terms below 1


@pytest.fixture(scope="module")
def resumes(folder: Path) -> dict[int, Any]:
    """What two processes begin and three go on with."""
    return {processes: checked(processes, "resumes", folder) for processes in (2, 3)}


@pytest.mark.nightly
@pytest.mark.parametrize("form", ["implicit", "nf4", "nf4 in float32"])
def test_a_run_goes_on_with_other_numbers_of_processes(form: str, resumes: dict[int, Any], folder: Path) -> None:
    whole = pissa.wrap(llama(), r=4, **FORMS[form])
    expected = train(whole, tokens(), steps=6, optimizer=sgd(whole, momentum=0.9))
    losses = resumes[2]["resumed"][0][form] + resumes[3]["resumed"][0][form]

    model = PissaModel.from_pretrained(llama(), folder / "resumed-3" / form, is_trainable=True)
    optimizer = sgd(model, momentum=0.9)
    saved = torch.load(folder / "resumed-3" / form / "optimizer.pt", weights_only=True)["state"]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            optimizer.state[parameter] = saved[name]
    losses += train(model, tokens(), steps=2, optimizer=optimizer)
    assert losses == pytest.approx(expected, **SAME)


def test_all_processes_are_suggested_one_rate(some: Found) -> None:
    *others, last = some["suggested"]
    for found in others:
        assert (found["rate"], found["losses"]) == (last["rate"], last["losses"])
        assert found["error"][0] == "RankError"
        assert last["error"][1] in found["error"][1]
    assert last["error"] == ["ValueError", last["error"][1]]
    assert "batches: got 0" in last["error"][1]
