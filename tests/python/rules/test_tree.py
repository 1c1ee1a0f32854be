"""The tree has no path of somebody's machine."""

from __future__ import annotations

import re
import shutil
import subprocess
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
