"""The seconds of a training step: which blocks are measured, in which architectures, and what is said where none can
be. The clock is counted, not compared."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from architectures import ARCHITECTURES, Architecture
from daily import each
from pissa.checkpoints import training_cost
from pissa.checkpoints.init import SplitPlan
from pissa.checkpoints.training_cost import step_seconds
from pissa.config import PissaConfig
from pissa.containers.released_codes import open_dense
from released_folders import release

CAUSAL = [name for name, one in ARCHITECTURES.items() if one.is_causal and not one.fields]
TUPLES = ("falcon", "glm_moe_dsa")
"""Whose blocks do not return what they are given."""
pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.PissaWarning")


def measured(folder: Path, quant: str | None = None) -> dict[str, Any]:
    with open_dense(folder) as source:
        layers = {layer.name: layer.shape for layer in SplitPlan(source, PissaConfig(r=1)).layers.values()}
    return step_seconds(folder, layers, 4, quant=quant, batch=2, length=8)


def saved(architecture: Architecture, folder: Path) -> Path:
    architecture.make().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name", each([name for name in CAUSAL if name not in TUPLES], ["llama3", "deepseek_v3", "gpt_oss", "mamba2"])
)
def test_one_block_of_each_kind(name: str, tmp_path: Path) -> None:
    found = measured(saved(ARCHITECTURES[name], tmp_path))
    assert "not measured" not in found, found
    assert sum(one["count"] for one in found["blocks"]) == 2
    names = [one["block"] for one in found["blocks"]]
    assert len(set(names)) == len(names)


def test_what_is_measured_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by one at each look: each pass takes 1, so that blocks take nothing beside the rest."""
    folder = saved(ARCHITECTURES["deepseek_v3"], tmp_path)
    with monkeypatch.context() as patch:
        ticks = itertools.count()
        patch.setattr(training_cost.time, "perf_counter", lambda: float(next(ticks)))
        found = measured(folder)
    assert found["rest"] == {"forward": 1.0, "backward": 1.0}
    assert [(one["count"], one["forward"], one["backward"]) for one in found["blocks"]] == [(1, 0.0, 0.0)] * 2
    assert found["plain"] == found["checkpointing"] == 2.0
    seconds = iter([(1.0, 2.0), (1.5, 3.0), (4.0, 5.0)])
    monkeypatch.setattr(training_cost, "_seconds", lambda *_: next(seconds))
    found = measured(folder)
    assert found["plain"] == 3 + 0.5 + 1 + 3 + 3
    assert found["checkpointing"] == found["plain"] + 0.5 + 3


def test_the_others_hand_on_what_they_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, skipped = saved(ARCHITECTURES["deepseek_v3"], tmp_path), []
    monkeypatch.setattr(training_cost, "_seconds", lambda _, __, some, *___: (skipped.append(len(some)), (1.0, 1.0))[1])
    assert "plain" in measured(folder, quant="nf4")
    assert skipped == [2, 1, 1]


def test_a_released_model(tmp_path: Path) -> None:
    release(ARCHITECTURES["deepseek_v4"].make(), "fp8-tiles", tmp_path / "model", "mxfp4-deepseek")
    assert "plain" in measured(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "message"),
    [("t5", "the layers are not in blocks"), ("roberta", "Error: "), *((name, "Error: ") for name in TUPLES)],
)
def test_where_it_cannot_be_measured(name: str, message: str, tmp_path: Path) -> None:
    found = measured(saved(ARCHITECTURES[name], tmp_path))
    assert found.keys() == {"not measured"}
    assert message in found["not measured"]
