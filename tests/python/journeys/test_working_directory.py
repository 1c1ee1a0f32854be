"""A model is split in one working directory, and what was trained on it with plain PEFT is used in another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoint_folders import contents
from language_models import error, logits, train
from lora_files import CLOSE, config_of
from peft_adapters import plain_logits
from pissa.cli import main


class Trained(NamedTuple):
    """A LoRA that PEFT has trained on residuals in another working directory."""

    adapter: Path
    residual: Path
    logits: Tensor


@pytest.fixture
def trained(base: Path, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """All paths are given as they look from there."""
    home = tmp_path / "home"
    home.mkdir()
    with monkeypatch.context() as there:
        there.chdir(home)
        assert main(["init", os.path.relpath(base), "split", "--rank", "4"]) == 0
        residual = AutoModelForCausalLM.from_pretrained("split")
        model = PeftModel.from_pretrained(residual, "split", subfolder="pissa_init", is_trainable=True)
        train(model, tokens)
        model.save_pretrained("run")
    return Trained(home / "run", home / "split", logits(model.eval(), tokens))


def test_what_is_written_is_the_same_from_everywhere(
    base: Path, trained: Trained, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = {
        "vllm": lambda adapter, out: ["export", adapter, out, "--to", "vllm"],
        "lora": lambda adapter, out: ["convert", adapter, out],
        "merge": lambda adapter, out: ["merge", adapter, out, "--base", path(base)],
    }
    found: dict[str, list[dict[str, bytes]]] = {name: [] for name in commands}
    for number, place in enumerate((trained.adapter.parent, tmp_path / "elsewhere")):
        place.mkdir(exist_ok=True)
        monkeypatch.chdir(place)
        for how, path in {"relative": os.path.relpath, "absolute": os.path.abspath}.items():
            for name, command in commands.items():
                out = tmp_path / f"{name} {how} {number}"
                assert main(command(path(trained.adapter), path(out))) == 0
                found[name].append(contents(out))
    for name, (first, *others) in found.items():
        assert all(other == first for other in others), name
    out = {name: tmp_path / f"{name} absolute 1" for name in commands}
    for name in ("vllm", "lora"):
        unmodified = AutoModelForCausalLM.from_pretrained(base)
        assert error(plain_logits(unmodified, out[name], tokens), trained.logits) < CLOSE, name
    assert error(logits(AutoModelForCausalLM.from_pretrained(out["merge"]), tokens), trained.logits) < CLOSE


def test_it_names_the_model_that_it_is_for(
    trained: Trained, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the residuals, on which the adapter itself was trained."""
    monkeypatch.chdir(trained.residual.parent)
    named = {}
    for name, command in {"vllm": ["export", "--to", "vllm"], "lora": ["convert"]}.items():
        assert main([*command, "run", name]) == 0
        named[name] = config_of(Path(name))["base_model_name_or_path"]
        assert named[name] in (None, str(base)), name
    assert f"vllm serve {named['vllm'] or 'BASE'} " in capsys.readouterr().out


@pytest.mark.parametrize("command", [["export", "--to", "vllm"], ["convert"], ["convert", "--rank", "4"]])
def test_without_the_residuals_nothing_is_written(
    command: list[str], trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter on them is no LoRA for the unmodified model, and cannot be told from one."""
    moved = trained.residual.rename(tmp_path / "moved")
    arguments = [*command, str(trained.adapter), str(tmp_path / "out")]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert str(trained.residual) in message
    assert "initial" in message
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--base", str(moved)]) == 0
