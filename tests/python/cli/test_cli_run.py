"""`pissa run`: somebody else's program, in which PEFT's PiSSA is ours; in the processes that it starts, too."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import pissa
from daily import each
from language_models import train
from pissa.cli import main
from pissa.cli.startup import peft as startup
from tiny_model import save_tiny_model

PROGRAM = Path(__file__).parents[1] / "support" / "peft_program.py"


def run(
    *arguments: str | Path, path: Path | None = None, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m pissa run` with these arguments; `path` first on PYTHONPATH, in `folder`."""
    entries = [str(path or ""), str(Path(pissa.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "pissa", "run", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, entries))},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("pissa run: ")]


@pytest.mark.parametrize("trains", each(["child", "both"], ["child"]))
def test_a_program_trains_what_wrap_makes(trains: str, tmp_path: Path) -> None:
    """Bit for bit, and so does the process that it starts. A sitecustomize.py of the user's is run in that, too."""
    save_tiny_model(tmp_path / "base")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text("print('the own one of', __name__, flush=True)\n")
    done = run("--", PROGRAM, tmp_path / "base", trains, "--flag", path=tmp_path / "own")
    assert done.returncode == 7, done.stderr
    own = "the own one of sitecustomize"
    before, replaced, parent, between, child = done.stdout.splitlines()
    assert (before, replaced, between) == (own, own, own)

    model = pissa.wrap(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), r=4)
    expected = train(model, torch.arange(24).view(2, 12))
    count = 1 if trains == "child" else 2
    for text, arguments, losses in ((parent, [trains, "--flag"], expected * (count - 1)), (child, ["last"], expected)):
        path = [str(PROGRAM.parent), startup.FOLDER]  # which processes that it spawns begin with
        assert json.loads(text) == {"arguments": arguments, "path": path, "losses": losses}
    took = (
        "pissa run: LoraConfig(init_lora_weights='pissa_niter_16') became PiSSA: rank 4, 14 layers, the base unchanged"
    )
    enabled = f"pissa run: PEFT's PiSSA and LoRA on 4-bit layers are pissa's in {PROGRAM}"
    assert lines(done.stderr) == [enabled, *count * [took]]


def test_modules_and_commands(tmp_path: Path) -> None:
    """A module of the current folder; a command of this environment; a command that is no Python."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__main__.py").write_text("import sys; print(sys.argv[1:], __name__); sys.exit(3)\n")
    done = run("--", "-m", "mine", "-m", "x", folder=tmp_path)
    assert (done.returncode, done.stdout) == (3, "['-m', 'x'] __main__\n")
    assert lines(done.stderr) == ["pissa run: PEFT's PiSSA and LoRA on 4-bit layers are pissa's in -m mine"]
    done = run("pytest", "--version", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"pytest {pytest.__version__}\n")
    done = run(
        "--init", "pissa", "--", "sh", "-c", 'echo "$PYTHONPATH"; echo "$PISSA_RUN_INIT"; exit 5', folder=tmp_path
    )
    path, init = done.stdout.splitlines()
    assert (done.returncode, init) == (5, "pissa")
    assert Path(path.split(os.pathsep)[0], "peft.py").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "got no program"),
        (["--"], "got no program"),
        (["no-such-command"], "no-such-command is not a command of this environment, and not on PATH"),
    ],
)
def test_no_program(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--", *arguments] if arguments != ["--"] else ["run", "--"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pissa run: {message}; give a command, a .py file, or -m MODULE")
    assert error.count("\n") == 1


def test_a_program_may_enable_it_itself(tmp_path: Path) -> None:
    """Before it imports peft: which enables it in between."""
    program = tmp_path / "program.py"
    text = (
        "import pissa.integrations.peft as ours\nours.enable()\nimport peft\nprint(ours.is_enabled(), peft.__file__)\n"
    )
    program.write_text(text)
    done = run("--", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"True {importlib.util.find_spec('peft').origin}\n"
