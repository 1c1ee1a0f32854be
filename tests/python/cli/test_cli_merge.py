"""`pissa merge`: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from interrupted import Interrupted
from pissa.cli import main
from runs import refused


def test_a_model_of_its_own(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["merge", str(adapter), "--base", str(base), str(out)]) == 0
    captured = capsys.readouterr()
    assert f"adapter   {adapter}: an adapter of pissa, 14 layers\n" in captured.out
    assert "error     dense, rounded once: 0.000% of the weights' norm, 0.000% of the change's\n" in captured.out
    assert f"saved     {out}: " in captured.out
    assert "PiSSA merge: 100%" in captured.err


def test_codes_and_json(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["merge", str(adapter), "--base", str(base), "--quant", "nf4"]
    assert main([*options, str(tmp_path / "a"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layers"] == report["quantised"] == 14
    assert report["what"] == "an adapter of pissa"
    assert 0.01 < report["error"] < 0.2
    assert main([*options, str(tmp_path / "b")]) == 0
    line = (
        f"14 layers in nf4: {report['error']:.3%} of the weights' norm, {report['error_of_change']:.3%} of the change's"
    )
    assert f"error     {line}\n" in capsys.readouterr().out
    assert "model.layers.0.self_attn.q_proj.weight.absmax" in load_file(tmp_path / "a" / "model.safetensors")


def test_a_refusal(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["merge", str(adapter), "--base", str(base), "--quant", "nf5", str(tmp_path / "out")]
    assert "quant: got 'nf5'" in refused(arguments, capsys)
    assert not (tmp_path / "out").exists()


def test_a_merge_that_is_interrupted_goes_on(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pissa.checkpoints import rewrite, trained

    monkeypatch.setattr(rewrite, "BATCH", 1)
    options = ["merge", str(adapter), "--base", str(base), str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(trained, "read_weight", Interrupted(trained.read_weight, at=5))
        assert main(options) == 130
    assert capsys.readouterr().err.endswith("pissa merge: interrupted; the same command goes on with it\n")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".unfinished"]
    assert main(options) == 0
    assert not re.search(r"PiSSA merge: +0%", capsys.readouterr().err)  # its bar begins where the other ended
