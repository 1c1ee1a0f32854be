"""bench/gpu, which only a machine with a GPU runs whole: the tests that it names exist, and its stages behave."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _bench_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def test_the_tests_that_it_names_exist() -> None:
    from bench.gpu import checks

    for name in (*checks.PYTHON_TESTS, "gpu"):
        assert checks.test_file(name).is_file()
    for name, cases in checks.SANITIZED.items():
        (path,) = (ROOT / "tests/cpp").rglob(f"{name}_test.cc")
        missing = [case for case in re.findall(r"\w+", cases) if case not in path.read_text()]
        assert not missing, f"{path} has no tests {missing}"


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nexit 9\n")
    smi.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    run = subprocess.run(
        ["bash", ROOT / "bench/gpu.sh"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "no GPU: nvidia-smi names none on this machine\n"


def test_a_stage_that_fails_does_not_keep_the_others_from_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.gpu.stages import Stage, Stages

    ended = []

    def script(text: str) -> None:
        stages.run(text.split()[-1], 30, lambda stage: stage.run("sh", "-c", text))

    def broken(stage: Stage) -> None:
        raise KeyError("of any kind")

    stages = Stages(tmp_path, 600, lambda: ended.append(None))
    script("true # passes")
    script("echo why; exit 3 # fails")
    stages.run("slow", 1, lambda stage: stage.run("sleep", "600"))
    stages.run("broken", 30, broken)
    stages.run("lacks", 30, broken, needs=["passes", "fails"])
    stages.run("lacks a skipped one", 30, broken, needs=["lacks"])
    stages.run("last", 30, lambda stage: None, needs=["passes"])
    assert stages.failed == ["fails", "slow", "broken"]
    assert stages.skipped == ["lacks", "lacks a skipped one"]
    assert len(ended) == 5
    printed = capsys.readouterr().out
    for text in (
        "    why\n    StageError: sh ended with status 3\n",
        "slow: out of its 1 s\n",
        "    KeyError: 'of any kind'\n",
        "lacks: not run, for lack of fails\n",
        "last: passed in ",
    ):
        assert text in printed

    late = Stages(tmp_path, 5, lambda: None)
    late.run("late", 30, lambda stage: None)
    assert late.skipped == ["late"]
