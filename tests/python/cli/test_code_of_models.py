"""Code that comes with a model or its tokenizer never runs unless --trust-remote-code is given, whatever stdin is:
transformers would ask there."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import pissa
from daily import each
from pissa.cli import main
from pissa.containers.checkpoint import ModelFolder
from runs import Terminal, command, save_preferences

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({mark!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig if {is_config} else LlamaConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
MODEL = {"AutoModelForCausalLM": "own.OwnModel"}
KINDS = {  # what of a folder is code, the file that says so, and the entries there
    "tokenizer": (
        "tokenizer_config.json",
        {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"},
    ),
    "config": (
        "config.json",
        {"auto_map": {"AutoConfig": "own.OwnConfig", **MODEL}, "model_type": "own", "architectures": ["OwnModel"]},
    ),
    "model": ("config.json", {"auto_map": MODEL, "architectures": ["OwnModel"]}),
}
NEEDED = "needs code that comes with it"


class Folders:
    """A model of each kind, an adapter of the model without its code, and data."""

    def __init__(self, folder: Path, base: Path, adapter: Path, data: Path) -> None:
        self.folder, self.adapter, self.data = folder, adapter, data
        self.preferences = save_preferences(folder)
        for kind in KINDS:
            self.add_code(kind, Path(shutil.copytree(base, folder / kind)))
        # What a run leaves whose tokenizer is code: copied into its folder.
        self.run = Path(shutil.copytree(base, folder / "run", ignore=shutil.ignore_patterns("config.json", "model*")))
        shutil.copytree(adapter, self.run, dirs_exist_ok=True)
        self.add_code("tokenizer", self.run)

    def add_code(self, kind: str, folder: Path) -> None:
        name, entries = KINDS[kind]
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | entries))
        (folder / "own.py").write_text(CODE.format(mark=str(self.folder / "ran"), is_config=kind == "config"))

    def has_run(self) -> bool:
        """Whether code has run since the last call."""
        with contextlib.suppress(FileNotFoundError):
            (self.folder / "ran").unlink()
            return True
        return False


@pytest.fixture(scope="module")
def folders(base: Path, adapter: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("code"), base, adapter, data)


Arguments = Callable[[Folders, Path, Path], list[str]]
"""Of a command, for the folders, a model and a new folder."""

_CALIBRATED = ["--rank", "2", "--quant", "nf4", "--examples", "2", "--calibration"]
_CHAT = ["--prompt", "17+1", "--max-tokens", "2"]
COMMANDS: dict[str, Arguments] = {
    "chat": lambda at, model, out: ["chat", str(model), *_CHAT],
    "chat --base": lambda at, model, out: ["chat", str(at.adapter), "--base", str(model), *_CHAT],
    "finetune": lambda at, model, out: command("finetune", model, at.data, out, "--rank", "2", steps=1),
    "dpo": lambda at, model, out: command("dpo", model, at.preferences, out, "--rank", "2", steps=1),
    "init": lambda at, model, out: ["init", str(model), str(out), "--rank", "2"],
    "init --calibration": lambda at, model, out: ["init", str(model), str(out), *_CALIBRATED, str(at.data)],
    "merge": lambda at, model, out: ["merge", str(at.adapter), str(out), "--base", str(model)],
    "merge --data": lambda at, model, out: [
        *("merge", str(at.adapter), str(out), "--base", str(model), "--data", str(at.data))
    ],
    "export": lambda at, model, out: ["export", str(at.adapter), str(out), "--base", str(model), "--to", "vllm"],
}
WITHOUT = {*(("tokenizer", name) for name in ("init", "merge")), *((kind, "export") for kind in KINDS)}
"""What needs no code, and is done."""

# What `input` would read "y" from, or fail on; chat asks a terminal for nothing else when it has --prompt.
STDINS: dict[str, Callable[[], io.StringIO | None]] = {
    "pipe": lambda: io.StringIO("y\n" * 9),
    "terminal": lambda: Terminal("y\n" * 9),
    "closed": lambda: None,
}


CASES = [(name, kind, stdin) for name in COMMANDS for kind in KINDS for stdin in STDINS]
DAILY = [("chat", "tokenizer", "pipe"), ("finetune", "tokenizer", "terminal"), ("init --calibration", "config", "pipe")]
DAILY += [("finetune", "model", "closed"), ("chat --base", "tokenizer", "pipe"), ("merge --data", "tokenizer", "pipe")]


@pytest.mark.parametrize(("name", "kind", "stdin"), each(CASES, DAILY))
def test_code_is_not_run(
    name: str,
    kind: str,
    stdin: str,
    folders: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", STDINS[stdin]())
    code = main(COMMANDS[name](folders, folders.folder / kind, tmp_path / "out"))
    said = capsys.readouterr().err
    assert not folders.has_run()
    assert "[y/N]" not in said
    assert (code, NEEDED in said) == ((0, False) if (kind, name) in WITHOUT else (2, True))
    assert (kind, name) in WITHOUT or not (tmp_path / "out").exists()


@pytest.mark.parametrize("stdin", STDINS)
def test_code_of_a_runs_tokenizer_is_not_run(
    stdin: str,
    folders: Folders,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", STDINS[stdin]())
    assert main(["chat", str(folders.run), "--base", str(base), *_CHAT]) == 2
    assert f"{folders.run} {NEEDED} ({{'AutoTokenizer': " in capsys.readouterr().err
    assert not folders.has_run()


@pytest.mark.parametrize(("name", "kind"), each([(n, k) for n in ("finetune", "dpo") for k in KINDS], ["finetune"]))
def test_code_is_run_if_it_is_trusted(
    name: str, kind: str, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    # Of a name that is new to the process, which imports a module once.
    model = shutil.copytree(folders.folder / kind, tmp_path / f"{kind}-for-{name}")
    arguments = COMMANDS[name](folders, model, tmp_path / "out")
    assert main([*arguments, "--trust-remote-code"]) == 0
    assert folders.has_run()
    assert main(["chat", str(tmp_path / "out"), *_CHAT]) == 2  # what the run was given is not given to this command
    assert not folders.has_run()
    for folder in (tmp_path / "out", model):
        assert main(["chat", str(folder), *_CHAT, "--trust-remote-code"]) == 0


@pytest.mark.parametrize("kind", ["config", "model"])
def test_load_runs_no_code(kind: str, folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(ValueError, match=NEEDED):
        pissa.load(folders.folder / kind, r=2)
    assert not folders.has_run()


def test_a_models_tokenizer_runs_no_code(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(ValueError, match=NEEDED):
        ModelFolder.open(folders.folder / "tokenizer").tokenizer()
    assert not folders.has_run()


@pytest.mark.nightly
@pytest.mark.parametrize("stdin", STDINS)
@pytest.mark.parametrize("name", ["chat", "init --calibration"])
def test_no_process_runs_code(name: str, stdin: str, folders: Folders, tmp_path: Path) -> None:
    """With a real pipe, a real terminal, and none."""
    arguments = [sys.executable, "-m", "pissa"]
    arguments += COMMANDS[name](folders, folders.folder / "tokenizer", tmp_path / "out")
    reader, writer = pty.openpty() if stdin == "terminal" else os.pipe()
    typed, given = (reader, writer) if stdin == "terminal" else (writer, reader)
    os.write(typed, b"y\n" * 9)
    shell = ["sh", "-c", 'exec "$@" <&-', "sh"] if stdin == "closed" else []
    done = subprocess.run([*shell, *arguments], stdin=given, capture_output=True, text=True)
    os.close(reader)
    os.close(writer)
    assert not folders.has_run()
    assert (done.returncode, NEEDED in done.stderr) == (2, True), done.stderr
