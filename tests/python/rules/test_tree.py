"""The tree: no path of somebody's machine, and tests that leave it as it was."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="no git, or no checkout")
def test_no_path_of_somebody_s_machine_is_committed() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    pattern = re.compile(r"(?<![\w.])/(?:home|root|work|tmp/\w)[/\w]")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix not in (".png", ".bin", ".safetensors") and path.is_file() and path != Path(__file__):
            found += [f"{name}: {line}" for line in path.read_text().splitlines() if pattern.search(line)]
    assert found == []


LEAVES = """
from pathlib import Path

def test_leaves():
    Path("left").mkdir()
    Path("left/README.md").touch()
    Path("changed").write_text("by a test")
    Path("ignored").touch()

def test_last():
    pass
"""


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_tests_that_leave_files_in_the_tree_are_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "python"
    (folder / "support").mkdir(parents=True)
    for name in ("conftest.py", "support/devices.py", "support/unrun.py"):
        shutil.copy(ROOT / "tests/python" / name, folder / name)
    (folder / "test_it.py").write_text(LEAVES)
    for name in ("there before", "changed"):
        (tmp_path / name).touch()
    (tmp_path / ".gitignore").write_text("ignored\n__pycache__/\n")
    for command in (["init", "-q"], ["add", "changed"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    options = ["-q", "-p", "no:cacheprovider", "-o", "pythonpath=tests/python/support"]
    tests = [sys.executable, "-m", "pytest", *options, str(folder)]
    run = subprocess.run(tests, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "2 passed, 1 error" in run.stdout
    assert run.returncode != 0
    (summary,) = (line for line in run.stdout.splitlines() if line.startswith("ERROR"))
    assert "test_last" in summary
    assert "write to tmp_path instead: ['?? left/README.md', 'AM changed']" in run.stdout
