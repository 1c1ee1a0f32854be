"""DeepSpeed ZeRO-3 in two processes: training is that of one, and what was gathered is saved; a model may be wrapped
before it is partitioned, or then.

DeepSpeed is no part of the extra `test`: it compiles a library of its own when it starts. `make test-slow` installs it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import pissa
from adapter_files import content
from distributed_worker import FORMS, SAME, llama, tokens, train
from pissa import PissaModel
from processes import launch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.cpu_only,
    pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")
    found = tmp_path_factory.mktemp("deepspeed")
    run = launch(2, "deepspeed_worker.py", found)
    assert run.returncode == 0, run.stdout[-5000:]
    return found


TRIED = ["implicit", "explicit", "nf4", "nf4 in float32", "dora", "head"]


def wrapped(form: str) -> nn.Module:
    fields = {"modules_to_save": ["lm_head"]} if form == "head" else FORMS[form]
    return pissa.wrap(llama(), r=4, **fields)


def losses(folder: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = json.loads((folder / "losses.json").read_text())
    return found


@pytest.mark.parametrize("form", TRIED)
def test_partitioned_training_is_that_of_one_process(form: str, folder: Path) -> None:
    assert losses(folder)[f"{form}, wrapped"] == pytest.approx(train(wrapped(form), tokens()), **SAME)
    saved = torch.load(folder / "wrapped" / f"{form}.pt")
    again = PissaModel.from_pretrained(llama(), folder / "wrapped" / form).state_dict()
    assert len(saved) == 2 * 7
    assert all(torch.equal(again[name], value) for name, value in saved.items())
    assert any(value.any() for value in saved.values())


@pytest.mark.parametrize("way", ["partitioned", "loaded"])
@pytest.mark.parametrize("form", TRIED)
def test_a_partitioned_model_that_is_wrapped_is_one_wrapped_first(form: str, way: str, folder: Path) -> None:
    assert losses(folder)[f"{form}, {way}"] == losses(folder)[f"{form}, wrapped"]
    first, other = (folder / one / form for one in ("wrapped", way))
    assert content(first) == content(other)


@pytest.mark.parametrize("form", TRIED)
def test_a_folder_is_loaded_onto_a_partitioned_model(form: str, folder: Path) -> None:
    expected = train(wrapped(form), tokens(), steps=6)[3:]
    assert losses(folder)[f"{form}, again"] == pytest.approx(expected, **SAME)


def test_a_process_holds_one_weight_of_its_own_and_one_that_passes(folder: Path) -> None:
    assert json.loads((folder / "most.json").read_text()) == 2


def test_a_model_of_an_engine_is_refused(folder: Path) -> None:
    refused = json.loads((folder / "refused.json").read_text())
    assert refused["wrap"][0] == "TypeError"
    assert "wrap the model before deepspeed.initialize" in refused["wrap"][1]
    assert "add it before fully_shard or deepspeed.initialize" in refused["add_adapter"][1]
    assert "load the adapter before deepspeed.initialize" in refused["load_adapter"][1]
