"""The commands on a GGUF file: what they train and answer, and where they take the tokenizer from."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import gguf_fixtures
from pissa.adapters.pissa_layout import PissaFolder
from pissa.cli import main
from pissa.cli.outcome import further
from pissa.containers.checkpoint import Contents, ModelFolder
from runs import command, logged, refused


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in codes."""
    path = tmp_path_factory.mktemp("gguf") / "model-Q4_0.gguf"
    gguf_fixtures.write(gguf_fixtures.make("llama"), "llama", path, gguf_fixtures.mixed)
    return path


@pytest.fixture(scope="module")
def ran(file: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run on it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(command("finetune", file, data, out, "--rank", "2", steps=6)) == 0
    return out


def test_finetune_trains_over_the_codes(ran: Path, file: Path) -> None:
    assert logged(ran)[-1] < logged(ran)[0]
    assert PissaFolder.open(ran).config.base_model_name_or_path == str(file)
    assert AutoTokenizer.from_pretrained(ran).eos_token == "</s>"


def test_the_command_that_follows_gives_one_file(ran: Path, file: Path) -> None:
    [line] = further(str(ran), str(file), Contents.GGUF)
    assert main(shlex.split(line)[1:]) == 0
    assert ModelFolder.open(ran.with_name("run.gguf")).contents is Contents.GGUF
    assert ran.with_name("run.Modelfile").read_text().startswith("FROM ./run.gguf\n")


@pytest.mark.parametrize("of", ["run", "file"])
def test_chat_answers(of: str, ran: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = {"run": ran, "file": file}[of]
    assert main(["chat", str(source), "--prompt", "1+1", "--max-tokens", "3"]) == 0
    assert str(file) in capsys.readouterr().err


def test_another_models_configuration_and_tokenizer(
    file: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = gguf_fixtures.make("granite")
    path = tmp_path / "granite.gguf"
    gguf_fixtures.write(model, "granite", path, gguf_fixtures.mixed, {"granite.rope.scaling.type": "dynamic"})
    model.config.architectures = ["GraniteForCausalLM"]
    model.config.save_pretrained(tmp_path / "from")
    said = refused(command("finetune", path, data, tmp_path / "no"), capsys)
    assert "rope.scaling.type is 'dynamic'" in said
    assert "--config-from" in said
    ModelFolder.open(file).tokenizer().save_pretrained(tmp_path / "from")
    given = ("--rank", "2", "--config-from", str(tmp_path / "from"))
    assert main(command("finetune", path, data, tmp_path / "run", *given)) == 0
    capsys.readouterr()
    chat = ["chat", str(tmp_path / "run"), "--prompt", "1+1", "--max-tokens", "3"]
    assert "--config-from" in refused(chat, capsys)
    assert main([*chat, *given[2:]]) == 0
