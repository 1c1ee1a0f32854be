"""The working directory, and whether paths are relative, change no byte of what is made of an adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import pissa
from language_models import Make, error, logits, train
from lora_files import CLOSE
from peft_adapters import plain_logits
from pissa.checkpoints.init import init
from pissa.checkpoints.merge import merge


def load(folder: str | Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def trained(tiny_llama: Make, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The logits of what PEFT has trained on the residual that was written to "split" in the folder "here", where
    its adapter is in "run", and one of ours in "ours"."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    tiny_llama().save_pretrained("base")
    init("base", "split", pissa.PissaConfig(r=4))
    model = peft.PeftModel.from_pretrained(load("split"), "split", subfolder="pissa_init", is_trainable=True)
    train(model, tokens)
    model.save_pretrained("run")
    ours = pissa.wrap(load("base"), r=4, quant="nf4")
    ours.warned_of_plain_lora = True
    ours.save_pretrained("ours")
    return logits(model.eval(), tokens)


WRITES: dict[str, Any] = {
    "vllm": lambda at, out: pissa.export(at("run"), out, "vllm"),
    "vllm, base": lambda at, out: pissa.export(at("run"), out, "vllm", base=at("base")),
    "convert": lambda at, out: pissa.convert(at("run"), out),
    "convert, base": lambda at, out: pissa.convert(at("run"), out, base=at("base")),
    "convert, rank": lambda at, out: pissa.convert(at("run"), out, rank=3),
    "convert ours": lambda at, out: pissa.convert(at("ours"), out, rank=3),
    "merge": lambda at, out: merge(at("run"), at("base"), out),
    "merge, residual": lambda at, out: merge(at("run"), at("split"), out),
}


@pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")
def test_the_same_bytes_from_any_working_directory(
    trained: Tensor, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "some" / "where"
    elsewhere.mkdir(parents=True)
    (elsewhere / "split").mkdir()  # of that name, and something else
    ways: list[tuple[Path, Callable[[str], str]]] = [
        (here, lambda folder: folder),
        (here, lambda folder: str(here / folder)),
        (elsewhere, lambda folder: f"../../here/{folder}"),
    ]
    for name, write in WRITES.items():
        found = []
        for number, (directory, at) in enumerate(ways):
            monkeypatch.chdir(directory)
            out = tmp_path / "out" / f"{name} {number}"
            write(at, out)
            found.append(contents(out))
        assert found[0] == found[1] == found[2], name
        if name in ("vllm", "convert"):
            assert error(plain_logits(load(here / "base"), out, tokens), trained) < CLOSE, name
        elif "merge" in name:
            assert error(logits(load(out).eval(), tokens), trained) < CLOSE, name


def test_what_is_written_names_folders_by_absolute_paths(trained: Tensor, tmp_path: Path) -> None:
    here = tmp_path / "here"
    pissa.export("ours", "out4", "bnb4")
    names = {"split/pissa_init": "split", "run": "split", "ours": "base", "out4/adapter": "out4"}
    for folder, base in names.items():
        assert peft.PeftConfig.from_pretrained(folder).base_model_name_or_path == str(here / base), folder
    assert pissa.PissaConfig.from_pretrained("split").base_model_name_or_path == str(here / "base")
    assert pissa.load("base", r=2).peft_config["default"].base_model_name_or_path == str(here / "base")
