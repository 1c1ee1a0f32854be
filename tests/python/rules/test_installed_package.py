"""What the wheel brings besides Python: the C++ library, which a program that knows only where pissa is installed links
and runs, and the list of the parts of others."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib import metadata
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


def test_the_parts_of_others_are_listed_with_their_licences() -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    installed = {path.name: path for path in metadata.files("pissa") or [] if path.parts[0].endswith(".dist-info")}
    listed = installed["pissa.cdx.json"]
    assert listed.parent.name == "sboms"  # PEP 770
    text = listed.read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    parts = {part["name"]: part["version"] for part in json.loads(text)["components"]}
    ours = {"Eigen", "pybind11", "PyTorch"}
    assert set(parts) == (ours | {"CUDA runtime"} if pissa.build_info()["cuda"] else ours)
    assert all(version[0].isdigit() and version[-1].isdigit() for version in parts.values())
    assert all(f"\n{part} " in installed["NOTICE"].read_text() for part in parts)
    assert {"LICENSE", *(f"LICENSE.{part}" for part in ours)} <= installed.keys()
