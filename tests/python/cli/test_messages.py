"""Messages of the commands that call a function of the package: they are the function's, paths and all."""

from __future__ import annotations

from pathlib import Path

import pytest

from pissa.cli import main


@pytest.mark.parametrize(
    "command",
    ["convert FOLDER OUT", "export FOLDER OUT --to vllm", "init FOLDER OUT", "merge ADAPTER OUT --base FOLDER"],
)
def test_folders_that_sweeps_name_after_options(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "rank=16,base=llama" / "initial=none,init=pissa,quant=nf4"
    places = {"FOLDER": str(folder), "OUT": str(tmp_path / "out")}
    assert main([places.get(word, word) for word in command.split()]) == 2
    assert str(folder) in capsys.readouterr().err
