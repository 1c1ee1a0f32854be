"""Every program of examples/ runs, on small models and data, and its notebook."""

from __future__ import annotations

import csv
import json
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import gguf_fixtures
import pages
import pissa
from pissa.cli import main
from released_folders import released
from runs import save_preferences, save_sums
from tiny_model import save_tiny_model, tiny_tokenizer

EXAMPLES = pages.ROOT / "examples"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small model with its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base")


def run(example: str, *arguments: Path) -> str:
    """What the program prints. As a user's: warnings do not end it."""
    command = [sys.executable, EXAMPLES / example, *arguments, "--steps", "2"]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def test_all_are_tested_and_short() -> None:
    programs = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert set(programs) == {"loop.py", "trl_sft.py", "dpo.py", "gguf_file.py", "released_model.py"}
    assert max(programs.values()) <= 80


def test_the_table_is_what_its_program_writes() -> None:
    program = runpy.run_path(str(pages.ROOT / "docs" / "tickets.py"))
    with (EXAMPLES / "tickets.csv").open(newline="", encoding="utf-8") as file:
        head, *rows = map(tuple, csv.reader(file))
    assert head == ("message", "team")
    assert rows == program["rows"]()
    assert len({message for message, _ in rows}) == len(rows) == 300


def test_loop(base: Path, tmp_path: Path) -> None:
    assert "step 1: loss" in run("loop.py", base, save_sums(tmp_path), tmp_path / "out")
    pissa.PissaModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "out")


def test_trl_sft(base: Path, tmp_path: Path) -> None:
    run("trl_sft.py", base, save_sums(tmp_path), tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_dpo(base: Path, tmp_path: Path) -> None:
    run("dpo.py", base, save_preferences(tmp_path), tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_gguf_file(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    gguf_fixtures.write(LlamaForCausalLM.from_pretrained(base), "llama", file, gguf_fixtures.mixed)
    printed = run("gguf_file.py", file, save_sums(tmp_path), tmp_path / "merged.gguf")
    assert "merged.gguf" in printed.splitlines()[-1]
    assert [tensor.name for tensor in GGUFReader(tmp_path / "merged.gguf").tensors] == [
        tensor.name for tensor in GGUFReader(file).tensors
    ]


def test_released_model(tmp_path: Path) -> None:
    released("llama", "fp8-tiles", tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    run("released_model.py", tmp_path / "model", save_sums(tmp_path), tmp_path / "out")
    tensors = [load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "out")]
    assert tensors[0].keys() == tensors[1].keys()
    assert any(not torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_notebook(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its commands are ours, and its model is a small one. Each cell that prints has the output of a real model."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]:
        text = "".join(cell["source"]).replace(pages.MODEL, str(base))
        if cell["cell_type"] == "markdown" or text.startswith("%pip install"):
            continue
        capsys.readouterr()
        if text.startswith("!pissa "):
            assert main(shlex.split(text)[1:]) == 0, text
        else:
            exec(compile(text, "a cell", "exec"), names)
        assert bool(capsys.readouterr().out) == bool(cell["outputs"]), text
    LlamaForCausalLM.from_pretrained("merged")
