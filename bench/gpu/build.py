"""The stage build: CMake, the library, `pissa` as it is imported here, tests, benchmarks; only what has changed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

from bench.gpu.machine import ROOT, Machine, output, query
from bench.gpu.stages import Job, LeftOutError, StageError

CPP_BENCHMARKS = ("bench_nf4", "bench_linear", "bench_svd")
EIGEN = "cmeel.prefix/include/eigen3"


def lacking(machine: Machine) -> list[str]:
    """What this machine lacks to build anything, each with how to get it. It takes no time."""
    pip = f"{sys.executable} -m pip install"
    found = [f"no {tool}: {pip} {tool}" for tool in ("cmake", "ninja") if not shutil.which(tool)]
    wheels = [path.name for path in machine.prepared.glob("wheels/*.whl")] if machine.prepared else []
    folders = [Path(path, EIGEN) for path in sys.path if path]
    folders += [Path("/usr/include/eigen3"), Path("/usr/local/include/eigen3")]
    if not any(name.startswith("cmeel_eigen-") for name in wheels) and not any(map(Path.is_dir, folders)):
        found.append(f"no Eigen: {pip} cmeel-eigen, or apt-get install libeigen3-dev")
    if not any(name.startswith("pybind11-") for name in wheels) and not importlib.util.find_spec("pybind11"):
        found.append(f"no pybind11: {pip} pybind11")
    if found:
        found.append("or bench/gpu/prepare.sh FOLDER where there is a network, and --prepared FOLDER here")
    return found


def configure(job: Job, machine: Machine) -> None:
    if found := lacking(machine):
        raise StageError("; ".join(found))
    prepared = [machine.prepared] if machine.prepared else []
    job.run(sys.executable, "-m", "bench.gpu.packages", machine.site, *prepared, cwd=ROOT)
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "PISSA_CUDA": "OFF" if machine.rehearsal else "ON",
        "PISSA_CUDA_ARCHITECTURES": f"{query('compute_cap').replace('.', '')}-real",
        "PISSA_BUILD_TESTS": "ON" if _has(machine, "googletest") else "OFF",
        "PISSA_BUILD_BENCH": "ON" if _has(machine, "benchmark") else "OFF",
        "PISSA_GOOGLETEST_DIR": _sources(machine, "googletest") or "",
        "PISSA_BENCHMARK_DIR": _sources(machine, "benchmark") or "",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": output(sys.executable, "-m", "pybind11", "--cmakedir").strip(),
    }
    _cmake(job, "-S", ROOT, "-B", machine.cmake, *(f"-D{name}={value}" for name, value in options.items()))


def _sources(machine: Machine, name: str) -> Path | None:
    """A folder of sources of GoogleTest or Google Benchmark: the variable's, the prepared one, Debian's."""
    folders = [Path(os.environ[variable])] if (variable := f"{name.upper()}_DIR") in os.environ else []
    folders += [machine.prepared / name] if machine.prepared else []
    return next((path for path in (*folders, Path("/usr/src", name)) if (path / "CMakeLists.txt").exists()), None)


def _has(machine: Machine, name: str) -> bool:
    header = {"googletest": "gtest/gtest.h", "benchmark": "benchmark/benchmark.h"}[name]
    return _sources(machine, name) is not None or Path("/usr/include", header).exists()


def compile_library(job: Job, machine: Machine) -> None:
    targets = ("_C",) if machine.rehearsal else ("_C", "pissa_cuda13")
    _cmake(job, "--build", machine.cmake, "-j", os.cpu_count(), "--target", *targets)


def module(job: Job, machine: Machine) -> None:
    """Puts the libraries and the Python files together as `pissa` in the folder `site`, and tries them."""
    shutil.rmtree(machine.site / "pissa", ignore_errors=True)
    _cmake(job, "--install", machine.cmake, "--component", "python", "--prefix", machine.site)
    for path in (ROOT / "python").rglob("*.py"):
        target = machine.site / path.relative_to(ROOT / "python")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    if job.status([sys.executable, "-m", "bench.gpu.smoke", machine.device], cwd=ROOT):
        raise StageError(job.lines()[-1])


def tests_of(machine: Machine) -> list[str]:
    """The targets that are tests of the CUDA backend."""
    found = output("cmake", "--build", str(machine.cmake), "--target", "help")
    names = set(re.findall(rf"^({machine.kind}_(?!sim)[a-z0-9_]*_test)\b", found, re.MULTILINE))
    return sorted(names)


def compile_tests(job: Job, machine: Machine) -> None:
    """Builds the tests. One that fails does not keep the others from being built, nor leaves an older one to be run."""
    if not _has(machine, "googletest"):
        raise LeftOutError("the C++ tests: no GoogleTest (GOOGLETEST_DIR, apt-get install libgtest-dev)")
    tests = tests_of(machine)
    if not tests:
        raise StageError(f"the build has no tests {machine.kind}_*_test")
    for test in tests:
        (machine.cmake / "tests/cpp" / test).unlink(missing_ok=True)
    _cmake(job, "--build", machine.cmake, "-j", os.cpu_count(), "--target", *tests, "--", "-k", "0")


def compile_benchmarks(job: Job, machine: Machine) -> None:
    if not _has(machine, "benchmark"):
        raise LeftOutError("the C++ benchmarks: no Google Benchmark (BENCHMARK_DIR, apt-get install libbenchmark-dev)")
    _cmake(job, "--build", machine.cmake, "-j", os.cpu_count(), "--target", *CPP_BENCHMARKS)


def _cmake(job: Job, *arguments: object) -> None:
    """Runs CMake.

    Raises:
        StageError: it failed; the message is the first error in its output, with the line after.
    """
    begin = len(job.lines())
    if job.status(["cmake", *arguments]):
        lines = job.lines()[begin:]
        first = next((i for i, line in enumerate(lines) if re.search(r"\berror\b|CMake Error", line)), None)
        said = lines[first : first + 2] if first is not None and "CMake Error" in lines[first] else lines[first:][:1]
        raise StageError(" ".join(" ".join(said).replace(f"{ROOT}/", "").split())[:300] or "cmake failed")
