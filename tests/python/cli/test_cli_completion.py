"""`pissa completion`, of which a shell is asked."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pissa.cli import COMMANDS, main

ASK = """
source {script}
COMP_WORDS=({words}) COMP_CWORD={last} COMP_LINE={line} COMP_POINT={length}
function=$(complete -p pissa | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
"$function" pissa {current} {previous}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "pissa"
    with path.open("w") as file:
        subprocess.run([sys.executable, "-m", "pissa", "completion", "bash"], stdout=file, check=True)
    return path


def completed(script: Path, *words: str) -> set[str]:
    """What bash offers for the last word of a line."""
    line = shlex.join(words)
    ask = ASK.format(
        script=shlex.quote(str(script)),
        words=line,
        last=len(words) - 1,
        line=shlex.quote(line),
        length=len(line),
        current=shlex.quote(words[-1]),
        previous=words[-2],
    )
    run = subprocess.run(["bash", "--norc", "-c", ask], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    return {word.strip() for word in run.stdout.splitlines()} - {""}


def test_bash_completes_commands_options_and_choices(script: Path) -> None:
    assert completed(script, "pissa", "") >= set(COMMANDS)
    assert completed(script, "pissa", "me") == {"merge"}
    assert completed(script, "pissa", "finetune", "--gradient-acc") == {"--gradient-accumulation-steps"}
    assert "--beta" in completed(script, "pissa", "dpo", "--b")
    assert "--beta" not in completed(script, "pissa", "finetune", "--b")
    assert completed(script, "pissa", "init", "--quant", "n") == {"nf4"}
    assert completed(script, "pissa", "env", "--j") == {"--json"}


def test_the_script_starts_no_python(script: Path) -> None:
    assert "python" not in script.read_text().replace("Python", "")


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in (*COMMANDS, "gradient-checkpointing"))
