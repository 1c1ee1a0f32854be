"""`pissa convert`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import pissa
from pissa.cli import main
from runs import refused


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def test_our_adapter_as_plain_lora(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(adapter), str(tmp_path / "lora")]) == 0
    out = capsys.readouterr().out
    assert f"source    {adapter}: an adapter of pissa\n" in out
    assert "rank      8 in 14 layers, now 8\n" in out
    assert "energy" not in out
    assert f"saved     {tmp_path / 'lora'}: a plain LoRA for the unmodified base\n" in out


def test_what_a_lower_rank_leaves_out(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = pissa.convert(adapter, tmp_path / "expected", rank=6)
    assert main(["convert", str(adapter), str(tmp_path / "lora"), "--rank", "6"]) == 0
    out = capsys.readouterr().out
    assert "rank      8 in 14 layers, now 6\n" in out
    assert f"energy    {done.kept:.4%} of the change of all layers\n" in out
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "lora" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()

    assert main(["convert", str(adapter), str(tmp_path / "json"), "--rank", "6", "--json"]) == 0
    ranks = {name: [8, 6] for name in done.ranks}
    assert json.loads(capsys.readouterr().out) == {**vars(done), "ranks": ranks, "notes": []}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Give rank to lower it"),
        (["--initial", "nowhere"], "nowhere is missing; needed: an adapter folder"),
    ],
)
def test_refusals(
    options: list[str], message: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft.get_peft_model(load(base), peft.LoraConfig(r=4)).save_pretrained(tmp_path / "plain")
    assert message in refused(["convert", str(tmp_path / "plain"), str(tmp_path / "lora"), *options], capsys)
    assert not (tmp_path / "lora").exists()


def test_an_interrupted_conversion_leaves_nothing(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pissa.conversion import convert

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "write_tensors", interrupted)
    assert main(["convert", str(adapter), str(tmp_path / "lora")]) == 130
    assert capsys.readouterr().err.endswith("\npissa convert: interrupted; nothing is written\n")
    assert not (tmp_path / "lora").exists()
