"""bench/gpu.sh from end to end, in its rehearsal: the programs of a GPU's machine are stand-ins, Python is on the CPU.

What it leaves is asserted: exit status, three files, the summary's first line.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import gpu_programs
from pissa.ops._load import _C

ROOT = Path(__file__).parents[3]
CARD = "nvidia_stand_in_1"


@dataclass
class Machine:
    """A folder in which bench/gpu.sh builds and leaves results; `packages` are found before those installed."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        gpu_programs.install(self.folder / "bin")
        self.package("pybind11", "")
        (self.folder / "packages/cmeel.prefix/include/eigen3").mkdir(parents=True)
        sources = self.folder / "googletest"
        for name in ("googletest", "benchmark"):
            (self.folder / name).mkdir()
            (self.folder / name / "CMakeLists.txt").touch()
        self.environment |= {
            **{name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "PYTHONPATH")},
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.folder / "packages"),
            "PYTHON": sys.executable,
            "OUT": str(self.folder / "out"),
            "GOOGLETEST_DIR": str(sources),
            "BENCHMARK_DIR": str(self.folder / "benchmark"),
            "STAND_IN_LOG": str(self.folder / "asked"),
            "STAND_IN_FAILS": "",
            "STAND_IN_CORE": str(Path(_C.__file__).parent),
            "OMP_NUM_THREADS": "1",
        }

    def package(self, name: str, text: str) -> None:
        folder = self.folder / "packages" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(text)

    def run(self, *arguments: str, status: int, **environment: str) -> list[str]:
        """Returns the lines of the summary."""
        command = ["bash", str(ROOT / "bench/gpu.sh"), "--rehearse", "--build", str(self.folder / "build"), *arguments]
        command += ["--seconds", "3000"]  # the machine may have much to do besides
        run = subprocess.run(
            command, env=self.environment | environment, cwd=self.folder, capture_output=True, text=True, check=False
        )
        assert run.returncode == status, run.stdout + run.stderr
        left = {path.name for path in (self.folder / "out").iterdir()}
        assert left == {f"{CARD}.json", f"{CARD}_summary.txt", f"{CARD}_logs.tar.gz"}
        summary = (self.folder / f"out/{CARD}_summary.txt").read_text().splitlines()
        assert run.stdout.splitlines()[-1] == summary[0]
        return summary

    def asked(self, program: str) -> list[str]:
        """What the program was asked for since the last call."""
        log = self.folder / "asked"
        lines = [line for line in log.read_text().splitlines() if line.startswith(program)]
        log.write_text("")
        return lines

    def rows(self) -> dict[str, dict[str, object]]:
        found = json.loads((self.folder / f"out/{CARD}.json").read_text())
        return {row["name"]: row for row in found["rows"]}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_every_stage_runs_and_a_second_call_goes_on(machine: Machine) -> None:
    summary = machine.run("build", "correctness", "start", "sanitizer", status=1, STAND_IN_FAILS="svd")
    assert summary[0] == "FAILED: correctness (cuda_sim_svd_test: 2 cases)"
    assert summary[2] == "card: NVIDIA Stand-in 1, 580.01, 81559 MiB, 9.0 (a rehearsal: nothing ran on it)"
    assert "C++ tests: 1 passed, 1 failed" in summary
    assert "memcheck: 14 tests clean, 0 not" in summary
    assert any(line.startswith("test_ops_int8.py: ") and " passed in " in line for line in summary)
    with tarfile.open(machine.folder / f"out/{CARD}_logs.tar.gz") as logs:
        assert {f"logs/{name}.log" for name in ("compile", "cpp-tests", "start", "racecheck-svd")} <= {*logs.getnames()}
    started = machine.rows()
    assert [name.split()[0] for name in started] == ["PiSSA", "QPiSSA"]
    assert any("-DPISSA_CUDA=OFF" in line for line in machine.asked("cmake"))

    summary = machine.run(status=0)
    stages = "build, correctness, start, linear, nf4, decode, models, sanitizer, profile"
    assert summary[0] == f"nothing failed; passed: {stages}"
    rows = machine.rows()
    assert {name: rows[name] for name in started} == started
    assert {row["stage"] for row in rows.values()} == {"start", "linear", "nf4", "decode", "models"}
    assert all(row["ours_median_ms"] > 0 and row["peer_median_ms"] > 0 for row in rows.values())  # type: ignore[operator]
    assert sum(line.startswith("| ") for line in summary) > len(rows)
    assert any("aten::" in line or "pissa::split_many" in line for line in summary)
    assert "svd_median  1 ms" in summary
    assert "C++ tests: 2 passed, 0 failed" in summary  # what failed ran again
    built = machine.asked("cmake")
    assert [line for line in built if "--target bench_nf4" in line]
    assert not [line for line in built if "_C" in line or "gemm_test" in line or line.startswith("cmake -S")]

    summary = machine.run("decode", "--rows", "M = 1 |", status=0)
    again = machine.rows()
    assert [name for name, row in again.items() if row != rows[name]] == [name for name in rows if "M = 1 |" in name]
    assert machine.run("decode", "--rows", "M = 3", status=1)[0].endswith("; not run: decode (no row contains 'M = 3')")


def test_a_build_that_fails_is_the_first_line(machine: Machine) -> None:
    summary = machine.run(status=1, STAND_IN_FAILS="compile")
    others = "correctness, start, linear, nf4, decode, models, sanitizer, profile"
    error = "cpp/pissa/cuda/gemm.cc:95:3: error: 'blas' was not declared"
    assert summary[0] == f"FAILED: build ({error}); not run: {others}"
    assert not machine.rows()
    machine.run("build", status=0)


def test_a_row_without_its_peer_is_measured_alone(machine: Machine) -> None:
    machine.package("bitsandbytes", "raise OSError('no library for this CUDA')\n")
    summary = machine.run("nf4", "--rows", "copy", "--rows", "dequantise", status=0)
    assert summary[0] == "nothing failed; passed: build, nf4"
    alone = machine.rows()["dequantise, 256 x 256 | bitsandbytes"]
    assert alone["ours_ms"]
    assert not alone["peer_ms"]
    assert alone["no_peer"] == "bitsandbytes does not import (OSError: no library for this CUDA)"
    (line,) = (line for line in summary if line.startswith("| dequantise, 256 x 256 | bitsandbytes |"))
    assert line.endswith("| no peer: bitsandbytes does not import (OSError: no library for this CUDA) |")
    assert sum("a copy of as many bytes" in name and bool(row["peer_ms"]) for name, row in machine.rows().items()) == 2


def test_a_row_that_fails_keeps_nothing_from_running(machine: Machine) -> None:
    machine.package("bitsandbytes", "functional = None\n")
    summary = machine.run("nf4", status=1)
    note = "AttributeError: 'NoneType' object has no attribute 'quantize_4bit'"
    first = "dequantise, 256 x 256: ModuleNotFoundError: No module named 'bitsandbytes.functional'"
    assert summary[0] == f"FAILED: nf4 (2 of 4 rows: {first})"
    assert machine.rows()["quantise, 256 x 256, nested scales | bitsandbytes"]["note"] == note
    assert sum(bool(row["peer_ms"]) for row in machine.rows().values()) == 2


def test_what_was_prepared_is_found_by_later_calls_too(machine: Machine) -> None:
    shutil.rmtree(machine.folder / "packages")
    wheels = {
        "cmeel_eigen-3.4-py3-none-any.whl": "cmeel.prefix/include/eigen3/Eigen/Cholesky",
        "pybind11-9.0-py3-none-any.whl": "pybind11/__init__.py",
    }
    (machine.folder / "prepared/wheels").mkdir(parents=True)
    for wheel, name in wheels.items():
        with zipfile.ZipFile(machine.folder / "prepared/wheels" / wheel, "w") as archive:
            archive.writestr(name, "")
    for call in (["--prepared", str(machine.folder / "prepared")], []):
        assert machine.run("build", *call, status=0)[0] == "nothing failed; passed: build"
    assert len([line for line in machine.asked("cmake") if line.startswith("cmake -S")]) == 2


def test_what_is_lacking_is_said_at_once(machine: Machine) -> None:
    (machine.folder / "packages/cmeel.prefix/include/eigen3").rmdir()
    for name in ("googletest", "benchmark"):
        (machine.folder / name / "CMakeLists.txt").unlink()
    if not (Path("/usr/include/eigen3").exists() or Path("/usr/local/include/eigen3").exists()):
        summary = machine.run("build", status=1)
        assert summary[0].startswith("FAILED: build (no Eigen: ")
        assert "-m pip install cmeel-eigen" in summary[0]
        assert not [line for line in machine.asked("cmake") if "-S" in line]
    (machine.folder / "packages/cmeel.prefix/include/eigen3").mkdir()
    if not Path("/usr/src/googletest").exists() and not Path("/usr/include/gtest").exists():
        summary = machine.run("build", status=0)
        assert summary[0].startswith("nothing failed; passed: build; left out: the C++ tests: no GoogleTest")
        assert any("-DPISSA_BUILD_TESTS=OFF" in line for line in machine.asked("cmake"))
