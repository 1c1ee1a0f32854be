"""DDP and FSDP2 on every architecture, dense and in 4 bits: a step of two processes is the step of one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from architectures import ARCHITECTURES, FORMS
from processes import launch

# processes/test_distributed.py has a Llama and a Mixtral on every change.
pytestmark = [pytest.mark.cpu_only, pytest.mark.nightly]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the first of two processes has found, all architectures in one start of them."""
    folder = tmp_path_factory.mktemp("architectures")
    done = launch(2, "distributed_worker.py", "architectures", folder)
    assert done.returncode == 0, done.stdout[-5000:]
    return json.loads((folder / "architectures-2-0.json").read_text())


@pytest.mark.parametrize("column", ["DDP", "FSDP2"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_of_two_processes_is_that_of_one(
    name: str, form: str, column: str, found: dict[str, dict[str, Any]]
) -> None:
    result = found[f"{name}, {form}, {column.lower()}"]
    verdict = result.get("value", result.get("error"))
    if form == "nf4" and ARCHITECTURES[name].nf4_refused is not None:
        assert verdict.startswith("refused: ")
    elif form == "implicit" and column in ARCHITECTURES[name].fails:
        assert ARCHITECTURES[name].fails[column] in verdict
    else:
        assert verdict == "pass"
