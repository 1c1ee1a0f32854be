"""DDP and FSDP2 on every architecture, dense and in 4 bits: a step of two processes is the step of one."""

from __future__ import annotations

import json
from typing import Any

import pytest

import matrix
from architectures import ARCHITECTURES, FORMS
from daily import each
from processes import launch

pytestmark = pytest.mark.cpu_only

DAILY = ("llama3", "mixtral", "gpt_oss", "qwen2_5_vl", "t5", "resnet")


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the first of two processes has found, the architectures of all selected tests in one start of them."""
    names = {item.callspec.params["name"]: None for item in request.session.items if item.path == request.path}
    folder = tmp_path_factory.mktemp("architectures")
    done = launch(2, "distributed_worker.py", "architectures", folder, *names)
    assert done.returncode == 0, done.stdout[-5000:]
    return json.loads((folder / "architectures-2-0.json").read_text())


@pytest.mark.parametrize("column", ["DDP", "FSDP2"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", each(ARCHITECTURES, DAILY))
def test_a_step_of_two_processes_is_that_of_one(
    name: str, form: str, column: str, found: dict[str, dict[str, Any]]
) -> None:
    result = found[f"{name}, {form}, {column.lower()}"]
    verdict = result.get("value", result.get("error"))
    if form == "nf4" and ARCHITECTURES[name].nf4_refused is not None:
        assert verdict.startswith("refused: ")
    elif form == "implicit" and (name, column) in matrix.NO:
        assert matrix.NO[name, column] in verdict
    else:
        assert verdict == "pass"
