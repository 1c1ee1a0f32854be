"""The C++ library in the wheel: a program that knows only where pissa is installed links it and runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import pissa

PACKAGE = Path(pissa.__file__).parent
PROGRAM = Path(__file__).parents[2] / "cpp/installed"
MISSING = [tool for tool in ("cmake", "ninja", "c++") if not shutil.which(tool)]

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(
        Path(__file__).parents[3] / "python/pissa" == PACKAGE, reason="only an installed pissa has the C++ library"
    ),
]


def run(*command: str | Path) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.skipif(bool(MISSING), reason=f"not on PATH: {', '.join(MISSING)}")
def test_a_program_finds_links_and_runs_it(tmp_path: Path) -> None:
    run("cmake", "-S", PROGRAM, "-B", tmp_path, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={PACKAGE}")
    run("cmake", "--build", tmp_path)
    assert run(tmp_path / "program") == "4.00000 2.00000\n"


def test_the_library_is_small() -> None:
    assert (PACKAGE / "lib/libpissa_cpu.a").stat().st_size <= 3_000_000
