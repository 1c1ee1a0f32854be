"""DeepSpeed ZeRO-3 in two processes: training is that of one, and what was gathered is saved.

DeepSpeed is no part of the extra `test`: it compiles a library of its own when it starts. `make test-slow` installs it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import pissa
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


@pytest.mark.parametrize("form", ["implicit", "nf4", "nf4 in float32"])
def test_partitioned_training_is_that_of_one_process(form: str, folder: Path) -> None:
    model = pissa.wrap(llama(), r=4, **FORMS[form])
    assert json.loads((folder / "losses.json").read_text())[form] == pytest.approx(train(model, tokens()), **SAME)
    saved = torch.load(folder / f"{form}.pt")
    again = PissaModel.from_pretrained(llama(), folder / form).state_dict()
    assert len(saved) == 2 * 14
    assert all(torch.equal(again[name], value) for name, value in saved.items())
    assert any(value.any() for value in saved.values())
