"""`pissa export`: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import checkpoint_folders
import pissa
from pissa.cli import main
from runs import refused


@pytest.fixture(scope="module")
def qpissa(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = pissa.wrap(AutoModelForCausalLM.from_pretrained(base), r=4, quant="nf4")
    model.warned_of_plain_lora = True
    folder = tmp_path_factory.mktemp("qpissa")
    model.save_pretrained(folder)
    return folder


def test_bnb4(qpissa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base is the one that the adapter names."""
    out = tmp_path / "out"
    assert main(["export", str(qpissa), str(out), "--to", "bnb4"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == f"adapter   {qpissa}: an adapter of pissa, 14 layers"
    assert lines[1] == "written   14 residuals in nf4, and a LoRA on them in adapter"
    assert re.fullmatch(rf"saved     {out}: \d+(\.\d+)? kB", lines[2])
    model = f"LlamaForCausalLM.from_pretrained('{out}')"
    assert lines[3:] == [f"load      PeftModel.from_pretrained({model}, '{out}/adapter')"]
    assert "PiSSA export: 100%" in captured.err


def test_the_error_of_experts_that_are_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint_folders.save("mixtral", tmp_path / "base", torch.bfloat16)
    model = pissa.wrap(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), r=4, quant="nf4")
    model.warned_of_plain_lora = True
    model.save_pretrained(tmp_path / "run")
    options = ["export", str(tmp_path / "run"), "--to", "bnb4"]
    assert main([*options, str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    assert main([*options, str(tmp_path / "b"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 0 < report["error"] < 2**-8
    assert f"error     {report['error']:.3%} of the weights' norm\n" in shown
    assert report["notes"] == []


def test_vllm_and_what_it_misses(qpissa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(qpissa), str(tmp_path / "out"), "--to", "vllm"]) == 0
    shown = capsys.readouterr().out
    assert f"--enable-lora --max-lora-rank 8 --lora-modules NAME={tmp_path / 'out'}\n" in shown
    assert "written   a LoRA of rank 8, 14 pairs of factors\n" in shown
    assert "note      The residual of the base is stored as nf4. On the unmodified base" in shown


def test_refusals(adapter: Path, qpissa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    message = refused(["export", str(adapter), out, "--to", "bnb4"], capsys)
    assert "on a base that was not in 4 bits" in message
    assert not (tmp_path / "out").exists()
